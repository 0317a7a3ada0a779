"""What a checkpoint reader hands to the loader."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from atom.utils.errors import ModelLoadError


class CheckpointFile:
    """A file of weights, read at given places by any thread; it stays open as long as somebody refers to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ModelLoadError(f"checkpoint file {path}: {error.strerror}") from None

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target`. Raises ModelLoadError, naming the file, where it can't be read or ends too early."""
        while target.nbytes:
            try:
                count = os.preadv(self._fd, [target], offset)
            except OSError as error:
                raise ModelLoadError(f"checkpoint file {self.path}: {error.strerror} at byte {offset}") from None
            if not count:
                raise ModelLoadError(f"checkpoint file {self.path}: truncated; it ends before byte {offset + 1}")
            target, offset = target[count:], offset + count

    def will_need(self, offset: int, size: int) -> None:
        """Ask the system to read this soon. Only a hint: what goes wrong shows when it is read."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Where a tensor's bytes are. plain: they are the tensor, row-major, in its own dtype."""

    file: CheckpointFile
    offset: int
    size: int
    plain: bool


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor under its Hugging Face name, read by `load()` and not before.

    dtype: as `load()` returns it. A GGUF reader dequantizes to the dtype that was asked for.
    span: None where it isn't known, or nothing would be gained from it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    span: FileSpan | None = None
