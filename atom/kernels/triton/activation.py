"""Gated activations."""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.numerics import round_to

_BLOCK = 1024


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr):
    """float32 silu(gate) * up, rounded to dtype where the reference rounds, but for the product."""
    gate = round_to(gate, dtype).to(tl.float32)
    return round_to(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32) * round_to(up, dtype).to(tl.float32)


@triton.jit
def _silu_and_mul_kernel(x, out, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    dtype = x.dtype.element_ty
    gate = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + size + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, round_to(silu_times(gate, up, dtype), dtype), mask=inside)


_launch_silu_and_mul = Launcher(_silu_and_mul_kernel)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`atom.kernels.torch.activation.silu_and_mul`."""
    if x.stride(-1) != 1 or (x.dim() != 2 and not x.is_contiguous()):
        x = x.contiguous()
    size = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    num_rows = x.numel() // (2 * size)
    if num_rows:
        stride = x.stride(-2) if x.dim() > 1 else 2 * size
        grid = num_rows, cdiv(size, _BLOCK), 1
        _launch_silu_and_mul(grid, (x, out), (stride, size), (_BLOCK,), num_warps=4)
    return out
