"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.launch import overlap_options, row_tile
from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.numerics import round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs


@triton.jit
def normalized(x, gain, eps, SIZE: tl.constexpr):
    """x [ROWS, COLUMNS], zero from column SIZE on, gain [COLUMNS] -> [ROWS, COLUMNS] of the type torch promotes to."""
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)
    scaled = round_to(wide * factor[:, None], x.dtype).to(tl.float32) * gain.to(tl.float32)[None, :]
    if x.dtype == gain.dtype:
        scaled = round_to(scaled, x.dtype)
    return scaled


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,
    weight,
    out,
    num_rows,
    num_heads,
    stride_token,
    stride_head,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Row r is head r % num_heads of token r // num_heads."""
    let_next_begin(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    source = (rows // num_heads) * stride_token + (rows % num_heads) * stride_head
    gain = tl.load(weight + columns, mask=columns < SIZE, other=0.0)
    wait_for_inputs(OVERLAP)
    values = tl.load(x + source[:, None] + columns[None, :], mask=inside, other=0.0)
    tl.store(out + rows[:, None] * SIZE + columns[None, :], normalized(values, gain, eps, SIZE), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    num_rows,
    stride_x,
    stride_residual,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The sum replaces the residual; `out` may be x."""
    let_next_begin(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    at_residual = residual + rows[:, None] * stride_residual + columns[None, :]
    gain = tl.load(weight + columns, mask=columns < SIZE, other=0.0)
    wait_for_inputs(OVERLAP)
    first = tl.load(x + rows[:, None] * stride_x + columns[None, :], mask=inside, other=0.0)
    second = tl.load(at_residual, mask=inside, other=0.0)
    total = round_to(first.to(tl.float32) + second.to(tl.float32), first.dtype)
    tl.store(at_residual, total, mask=inside)
    tl.store(out + rows[:, None] * SIZE + columns[None, :], normalized(total, gain, eps, SIZE), mask=inside)


_launch_rms_norm = Launcher(_rms_norm_kernel)
_launch_add_rms_norm = Launcher(_add_rms_norm_kernel)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`atom.kernels.torch.norm.rms_norm`; x [..., N] may be a strided view of up to three dimensions."""
    size = x.shape[-1]
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.contiguous().view(-1, size)
    if x.dim() == 3:
        tokens, heads = x.shape[:2]
        stride_token, stride_head = x.stride(0), x.stride(1)
    else:
        tokens, heads = (x.shape[0], 1) if x.dim() == 2 else (1, 1)
        stride_token, stride_head = (x.stride(0), 0) if x.dim() == 2 else (0, 0)
    dtype = x.dtype if x.dtype == weight.dtype else torch.promote_types(x.dtype, weight.dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    num_rows = tokens * heads
    if num_rows:
        rows, columns, warps = row_tile(num_rows, size)
        _launch_rms_norm(
            (cdiv(num_rows, rows), 1, 1),
            (x, weight, out),
            (num_rows, heads, stride_token, stride_head, eps),
            (size, rows, columns),
            num_warps=warps,
            **overlap_options(x.device),
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`atom.kernels.torch.norm.add_rms_norm`; writes over both inputs."""
    size = x.shape[-1]
    x, residual = as_rows(x), as_rows(residual)
    in_place = x.dtype == weight.dtype and x.is_contiguous()
    out = x if in_place else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    num_rows = x.numel() // size
    if num_rows:
        rows, columns, warps = row_tile(num_rows, size)
        stride_x = x.stride(-2) if x.dim() > 1 else size
        stride_residual = residual.stride(-2) if residual.dim() > 1 else size
        _launch_add_rms_norm(
            (cdiv(num_rows, rows), 1, 1),
            (x, residual, weight, out),
            (num_rows, stride_x, stride_residual, eps),
            (size, rows, columns),
            num_warps=warps,
            **overlap_options(x.device),
        )
    return out, residual


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where one stride walks its rows, else a copy."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1) else x.contiguous()
