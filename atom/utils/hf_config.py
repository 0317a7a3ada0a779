"""Reads what a checkpoint says about itself: its configuration and its generation defaults."""

import json
from typing import TYPE_CHECKING, Any

from atom.utils import envs, startup
from atom.utils.errors import ConfigError, ModelLoadError
from atom.utils.light_transformers import import_validators
from atom.utils.model_path import ModelPath

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


def import_transformers() -> None:
    """What any model's configuration needs of transformers."""
    with startup.phase("import transformers"):
        import_validators()
        import transformers.models.auto.configuration_auto  # noqa: F401


def load_hf_config(path: ModelPath, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The transformers configuration of a model; ModelLoadError, in one line, when there is none to be had."""
    if path.gguf_file is not None:
        from atom.utils.gguf_config import gguf_hf_config
        from atom.utils.gguf_file import read_gguf

        import_transformers()
        return gguf_hf_config(read_gguf(path.gguf_file))
    raw = _read_json(path, "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelLoadError(f"model={path.name!r}: config.json has no model_type")

    import_transformers()
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        if not raw.get("auto_map"):
            raise ModelLoadError(f"model={path.name!r}: model_type {model_type!r} is not known")
        if not trust_remote_code:
            raise ModelLoadError(
                f"model={path.name!r}: model_type {model_type!r} needs code that comes with the checkpoint; "
                "read that code, then pass --trust-remote-code"
            )
        # Refused before any of that code runs.
        raise ConfigError(f"trust_remote_code: model_type {model_type!r} with code of its own is not supported yet")
    try:
        return AutoConfig.from_pretrained(
            path.directory, trust_remote_code=trust_remote_code, token=envs.HF_TOKEN, local_files_only=True
        )
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise ModelLoadError(f"model={path.name!r}: config.json is not valid: {_first_line(error)}") from None


def load_generation_config(path: ModelPath, hf_config: "PretrainedConfig") -> "GenerationConfig":
    """generation_config.json; without one, the special tokens that the model's configuration names."""
    from transformers import GenerationConfig

    if path.gguf_file is not None:
        from atom.utils.gguf_config import gguf_stop_token_ids
        from atom.utils.gguf_file import read_gguf

        stop = gguf_stop_token_ids(read_gguf(path.gguf_file))
        return GenerationConfig(bos_token_id=hf_config.bos_token_id, eos_token_id=stop or None)
    if (path.directory / "generation_config.json").is_file():
        raw = _read_json(path, "generation_config.json")
        try:
            return GenerationConfig.from_dict(raw)
        except Exception as error:
            reason = _first_line(error)
            raise ModelLoadError(f"model={path.name!r}: generation_config.json is not valid: {reason}") from None
    text = text_config(hf_config)
    return GenerationConfig(
        bos_token_id=getattr(text, "bos_token_id", None), eos_token_id=getattr(text, "eos_token_id", None)
    )


def text_config(hf_config: Any) -> Any:
    """The language model's part of a multimodal configuration; otherwise the configuration itself."""
    inner = getattr(hf_config, "text_config", None)
    return hf_config if inner is None else inner


def _read_json(path: ModelPath, file: str) -> dict[str, Any]:
    try:
        value = json.loads((path.directory / file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"model={path.name!r}: can't read {file}: {_first_line(error)}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelLoadError(f"model={path.name!r}: {file} is not valid JSON: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"model={path.name!r}: {file} must hold a JSON object, not {type(value).__name__}")
    return value


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
