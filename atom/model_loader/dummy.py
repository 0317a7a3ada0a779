"""Weights for benchmarks and tests without a checkpoint: small random numbers, the same on every run.

Each tensor's numbers depend only on its name, shape, dtype and kind of device, never on the order of filling.
"""

import math
import zlib

import torch

_STD = 0.02
_UNIFORM_BOUND = _STD * math.sqrt(3)  # uniform numbers cost half of normal ones and serve as well
_CHUNK = 1 << 26  # elements; bounds the temporary of dtypes that can't be drawn directly


@torch.no_grad()
def fill_dummy(name: str, tensor: torch.Tensor) -> None:
    """In place: norm weights near 1, scales 1, other floats with a standard deviation of 0.02, integers at random."""
    generator = torch.Generator(device=tensor.device).manual_seed(zlib.crc32(name.encode()))
    dtype = tensor.dtype
    leaf = name.rsplit(".", 1)[-1]
    if dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        if "scale" in leaf:
            tensor.fill_(1.0)
            return
        tensor.uniform_(-_UNIFORM_BOUND, _UNIFORM_BOUND, generator=generator)
        if tensor.ndim == 1 and leaf == "weight":
            tensor.add_(1.0)
        return
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        if dtype.is_floating_point:
            values = torch.empty(piece.shape, device=piece.device, dtype=torch.float32)
            piece.copy_(values.uniform_(-_UNIFORM_BOUND, _UNIFORM_BOUND, generator=generator))
        elif dtype is torch.bool:
            piece.fill_(False)
        else:
            limits = torch.iinfo(dtype)
            piece.random_(max(limits.min, -128), min(limits.max, 255) + 1, generator=generator)
