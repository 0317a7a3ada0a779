"""What a checkpoint reader hands to the loader."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor under its Hugging Face name, read by `load()` and not before.

    dtype: as `load()` returns it. A GGUF reader dequantizes to the dtype that was asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
