"""Reads a folder of safetensors files, one or many, memory-mapped.

Does not read pickled checkpoints (.bin, .pt): they can run code when opened.
"""

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from atom.model_loader.checkpoint import CheckpointFile, CheckpointTensor, FileSpan
from atom.utils.errors import ModelLoadError

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(directory: Path) -> Iterator[CheckpointTensor]:
    """Every tensor of the checkpoint, to be read when asked for.

    Raises ModelLoadError naming the file for anything missing or damaged.
    """
    expected = _read_index(directory)
    paths = [directory / name for name in expected] if expected else _find_files(directory)
    origin: dict[str, Path] = {}
    for path in paths:
        file = _File(path)
        for name in file.shapes:
            if name in origin:
                raise ModelLoadError(f"checkpoint {directory}: {name} is in both {origin[name].name} and {path.name}")
            origin[name] = path
        absent = expected.get(path.name, set()) - file.shapes.keys()
        if absent:
            raise ModelLoadError(
                f"checkpoint {directory}: {_INDEX} places {min(absent)} in {path.name}, which doesn't hold it"
                + (f" (nor {len(absent) - 1} others)" if len(absent) > 1 else "")
            )
        for name, (shape, dtype) in file.shapes.items():
            yield CheckpointTensor(name, shape, dtype, partial(file.read, name), file.spans.get(name))


class _File:
    """One open file. safe_open keeps the mapping alive as long as this object or a tensor from it lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.handle = safe_open(str(path), framework="pt", device="cpu")
            slices = {name: self.handle.get_slice(name) for name in self.handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"checkpoint file {path}: {_explain(path, error)}") from None
        self.lock = threading.Lock()
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, part in slices.items():
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise ModelLoadError(
                    f"checkpoint file {path}: {name} has dtype {part.get_dtype()}; supported are {', '.join(_DTYPES)}"
                )
            self.shapes[name] = (tuple(part.get_shape()), dtype)
        self.spans = _read_spans(path)

    def read(self, name: str) -> torch.Tensor:
        with self.lock:
            return self.handle.get_tensor(name)


def _read_spans(path: Path) -> dict[str, FileSpan]:
    """Where each tensor's bytes are, in a file whose header safe_open has checked."""
    source = CheckpointFile(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    first = 8 + size
    spans = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            spans[name] = FileSpan(source, first + begin, end - begin, plain=True)
    return spans


def _find_files(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    # Some repositories hold the same weights a second time in the trainer's own layout.
    files = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if files:
        return files
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise ModelLoadError(
            f"model {directory}: only pickled weights (.bin, .pt) were found; convert them to safetensors "
            "(transformers: model.save_pretrained(folder))"
        )
    raise ModelLoadError(
        f"model {directory}: no weights; expected *.safetensors there, a .gguf file, or load_dummy=True"
    )


def _read_index(directory: Path) -> dict[str, set[str]]:
    """{file name: the tensors it must hold} from the index, {} when there is none."""
    path = directory / _INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"checkpoint index {path}: not readable as JSON ({error})") from None
    except (KeyError, TypeError):
        raise ModelLoadError(f'checkpoint index {path}: expected an object with the key "weight_map"') from None
    valid = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not valid or not weight_map:
        raise ModelLoadError(f'checkpoint index {path}: "weight_map" must map tensor names to file names')
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if name in ("", ".", "..") or Path(name).name != name:
            raise ModelLoadError(f"checkpoint index {path}: file {name!r} for {tensor} lies outside the model's folder")
        files.setdefault(name, set()).add(tensor)
    missing = sorted(name for name in files if not (directory / name).exists())
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ModelLoadError(f"checkpoint {directory}: {len(missing)} of {len(files)} files are missing: {shown}")
    return dict(sorted(files.items()))


def _explain(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the weights; run `git lfs pull` in the model's folder"
    reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ").rstrip(".")
    return f"truncated or damaged safetensors ({reason}); {path.stat().st_size} bytes long"
