"""The tokenizer of a model: from its folder, from another folder, or from a GGUF file's metadata."""

from pathlib import Path
from typing import TYPE_CHECKING

from atom.utils.errors import ModelLoadError
from atom.utils.gguf_file import read_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atom.config import Config


def load_tokenizer(config: "Config") -> "PreTrainedTokenizerBase":
    """`config.tokenizer` where it is set, else the model's own. Raises ModelLoadError in one line."""
    from atom.utils.model_path import resolve_model

    name = getattr(config, "tokenizer", None)
    if name and _holds_tokenizer(Path(name)):
        return _from_folder(name, config.trust_remote_code)
    location = resolve_model(name or config.model, weights=False)
    if location.gguf_file is not None:
        from atom.model_loader.gguf_tokenizer import build_tokenizer

        return build_tokenizer(read_gguf(location.gguf_file))
    return _from_folder(str(location.directory), config.trust_remote_code)


def _holds_tokenizer(folder: Path) -> bool:
    """A folder that was given for its tokenizer needn't hold a model."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _from_folder(folder: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        # transformers raises whatever its parsers raise; the user needs the folder and the reason.
        if "trust_remote_code" in str(error):
            raise ModelLoadError(
                f"tokenizer {folder}: it needs code from the model's folder; pass trust_remote_code=True to run it"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f"tokenizer {folder}: could not be loaded ({reason}); "
            "expected tokenizer.json and tokenizer_config.json there"
        ) from None
