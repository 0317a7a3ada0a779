"""Reads the header of a GGUF file: metadata and the table of tensors. Standard library only.

The `gguf` package's reader makes numpy views of every vocabulary entry, which takes seconds; this one takes
milliseconds, so that configuration, tokenizer and weights can each look at the file. It does not decode tensors.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from atom.utils.errors import ModelLoadError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """shape: outermost dimension first, as torch writes it. offset: from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own section: `get("block_count")` is `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Raises ModelLoadError when the file is missing, damaged, or of another format. The last file is remembered."""
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelLoadError(f"GGUF file {path}: {error.strerror}") from None
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, size: int, _mtime: int) -> GGUFFile:
    if size < 24:
        raise ModelLoadError(f"GGUF file {path}: {size} bytes are too few for a header; the file is truncated")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Parser(path, data).parse()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError, MemoryError, KeyError) as error:
            raise ModelLoadError(f"GGUF file {path}: the header is truncated or damaged ({error})") from None


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def parse(self) -> GGUFFile:
        if self.data[:4] != b"GGUF":
            raise ModelLoadError(f"GGUF file {self.path}: it doesn't start with 'GGUF', so it is another format")
        self.position = 4
        version = self.scalar("I")
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise ModelLoadError(f"GGUF file {self.path}: version {version}{hint}; versions 2 and 3 are supported")
        num_tensors, num_values = self.scalar("Q"), self.scalar("Q")
        metadata = {}
        for _ in range(num_values):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        if "general.architecture" not in metadata:
            raise ModelLoadError(f"GGUF file {self.path}: general.architecture is missing")
        table = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ModelLoadError(f"GGUF file {self.path}: general.alignment is {alignment!r}, not a positive number")
        start = -(-self.position // alignment) * alignment
        tensors = {name: GGUFTensor(name, shape, kind, start + offset) for name, shape, kind, offset in table}
        return GGUFFile(self.path, metadata, tensors)

    def scalar(self, code: str) -> Any:
        unpacker = _UNPACKERS[code]
        (result,) = unpacker.unpack_from(self.data, self.position)
        self.position += unpacker.size
        return result

    def string(self) -> str:
        length = self.scalar("Q")
        raw = self.data[self.position : self.position + length]
        if len(raw) != length:
            raise IndexError(f"a string of {length} bytes at byte {self.position} is cut")
        self.position += length
        return raw.decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("I"), self.scalar("Q")
            if element == _STRING:
                return self.strings(count)
            if element == _ARRAY:
                return [self.value(element) for _ in range(count)]
            unpacker = struct.Struct(f"<{count}{_SCALARS[element]}")
            values = list(unpacker.unpack_from(self.data, self.position))
            self.position += unpacker.size
            return values
        return self.scalar(_SCALARS[kind])

    def strings(self, count: int) -> list[str]:
        # The vocabulary is read here, so the loop keeps everything in locals.
        data, position, length_at = self.data, self.position, _UNPACKERS["Q"].unpack_from
        result = []
        for _ in range(count):
            end = position + 8 + length_at(data, position)[0]
            result.append(data[position + 8 : end].decode("utf-8", "surrogateescape"))
            position = end
        if position > len(data):
            raise IndexError("an array of strings is cut")
        self.position = position
        return result

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dims = [self.scalar("Q") for _ in range(self.scalar("I"))]
        return name, tuple(reversed(dims)), self.scalar("I"), self.scalar("Q")


_UNPACKERS = {code: struct.Struct("<" + code) for code in _SCALARS.values()}
