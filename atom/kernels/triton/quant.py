"""Rows in eight bits, alone or fused with the norm or the activation before them; see `atom.kernels.torch.quant`."""

import torch
import triton
import triton.language as tl

from atom.kernels.torch.quant import largest
from atom.kernels.triton.activation import silu_times
from atom.kernels.triton.launch import next_power_of_2, overlap_options, row_tile, wide_row_warps
from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.norm import as_rows, normalized
from atom.kernels.triton.numerics import round_to, scale_rows
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs

_BLOCK = 1024  # columns a program holds where it needn't hold whole rows


@triton.jit
def _store_quantized(
    x,
    out,
    scales,
    rows,
    first_column,
    num_rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
):
    """x: [ROWS, COLUMNS] of whole groups, zero outside; it belongs to `rows` from first_column on."""
    GROUPS: tl.constexpr = COLUMNS // GROUP
    ALL_GROUPS: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    values, scale = scale_rows(tl.reshape(x.to(tl.float32), [ROWS, GROUPS, GROUP]), TOP)
    values = round_to(tl.reshape(values, [ROWS, COLUMNS]), out.dtype.element_ty)
    exists = (rows < num_rows)[:, None]
    columns = (first_column + tl.arange(0, COLUMNS))[None, :]
    tl.store(out + rows[:, None] * SIZE + columns, values, mask=exists & (columns < SIZE))
    groups = (first_column // GROUP + tl.arange(0, GROUPS))[None, :]
    scale = tl.reshape(scale, [ROWS, GROUPS])
    tl.store(scales + rows[:, None] * ALL_GROUPS + groups, scale, mask=exists & (groups < ALL_GROUPS))


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x,
    out,
    scales,
    num_rows,
    stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    wait_for_inputs(OVERLAP)
    values = tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    _store_quantized(values, out, scales, rows, first, num_rows, SIZE, ROWS, COLUMNS, GROUP, TOP)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_quant_kernel(
    x,
    residual,
    weight,
    out,
    scales,
    num_rows,
    stride_x,
    stride_residual,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Where there is a residual, it is added, and the sum replaces it."""
    let_next_begin(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    gain = tl.load(weight + columns, mask=columns < SIZE, other=0.0)
    wait_for_inputs(OVERLAP)
    values = tl.load(x + rows[:, None] * stride_x + columns[None, :], mask=inside, other=0.0)
    if residual is not None:
        at_residual = residual + rows[:, None] * stride_residual + columns[None, :]
        second = tl.load(at_residual, mask=inside, other=0.0)
        values = round_to(values.to(tl.float32) + second.to(tl.float32), values.dtype)
        tl.store(at_residual, values, mask=inside)
    normed = normalized(values, gain, eps, SIZE)
    _store_quantized(normed, out, scales, rows, 0, num_rows, SIZE, ROWS, COLUMNS, GROUP, TOP)


@triton.jit(do_not_specialize=["num_rows"])
def _silu_and_mul_quant_kernel(
    x,
    out,
    scales,
    num_rows,
    stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    source = x + rows[:, None] * stride + columns[None, :]
    wait_for_inputs(OVERLAP)
    dtype = x.dtype.element_ty
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    activated = round_to(silu_times(gate, up, dtype), dtype)
    _store_quantized(activated, out, scales, rows, first, num_rows, SIZE, ROWS, COLUMNS, GROUP, TOP)


_launch_quantize = Launcher(_quantize_kernel)
_launch_rms_norm_quant = Launcher(_rms_norm_quant_kernel)
_launch_silu_and_mul_quant = Launcher(_silu_and_mul_quant_kernel)


def quantize(x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`atom.kernels.torch.quant.quantize`; group_size must be a power of two."""
    return _quantize_with(_launch_quantize, x, x.shape[1], dtype, group_size)


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`atom.kernels.torch.quant.rms_norm_quant`; group_size must be a power of two."""
    return _norm_quant(x, None, weight, eps, dtype, group_size)


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`atom.kernels.torch.quant.add_rms_norm_quant`; writes over the residual."""
    residual = as_rows(residual)
    return *_norm_quant(x, residual, weight, eps, dtype, group_size), residual


def silu_and_mul_quant(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`atom.kernels.torch.quant.silu_and_mul_quant`; group_size must be a power of two."""
    return _quantize_with(_launch_silu_and_mul_quant, x, x.shape[1] // 2, dtype, group_size)


def _quantize_with(
    launch: Launcher, x: torch.Tensor, size: int, dtype: torch.dtype, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a kernel that makes rows of `size` columns from x; each group of them is independent."""
    x = as_rows(x)
    num_rows = x.shape[0]
    out, scales = _results(x, size, dtype, group_size)
    if num_rows:
        grid, constants, warps = _tiles(num_rows, size, dtype, group_size, whole_rows=group_size is None)
        launch(
            grid,
            (x, out, scales),
            (num_rows, x.stride(0)),
            constants,
            num_warps=warps,
            **overlap_options(x.device),
        )
    return out, scales


def _norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = as_rows(x)
    num_rows, size = x.shape
    out, scales = _results(x, size, dtype, group_size)
    if num_rows:
        grid, constants, warps = _tiles(num_rows, size, dtype, group_size, whole_rows=True)
        _launch_rms_norm_quant(
            grid,
            (x, residual, weight, out, scales),
            (num_rows, x.stride(0), 0 if residual is None else residual.stride(0), eps),
            constants,
            num_warps=warps,
            **overlap_options(x.device),
        )
    return out, scales


def _results(
    x: torch.Tensor, size: int, dtype: torch.dtype, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = 1 if group_size is None else cdiv(size, group_size)
    return x.new_empty((x.shape[0], size), dtype=dtype), x.new_empty((x.shape[0], groups), dtype=torch.float32)


def _tiles(
    num_rows: int, size: int, dtype: torch.dtype, group_size: int | None, *, whole_rows: bool
) -> tuple[tuple[int, int, int], tuple[int | float, ...], int]:
    """(grid, the constants SIZE to TOP, warps)"""
    width = size if whole_rows else min(size, _BLOCK)
    rows, columns, warps = row_tile(num_rows, width if group_size is None else max(width, group_size))
    if columns > 8192:
        warps = wide_row_warps(num_rows)
    group = columns if group_size is None else group_size
    assert group == next_power_of_2(group)
    return (cdiv(num_rows, rows), cdiv(size, columns), 1), (size, rows, columns, group, largest(dtype)), warps
