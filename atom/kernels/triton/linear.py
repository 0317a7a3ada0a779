"""Dense layers.

With one token a product reads each weight once and multiplies little: there a program takes a few output rows, and
nothing needs a second pass. With more, torch's own matrix product takes over, with our activation behind it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.compiler import is_compiling

from atom.kernels.torch import linear as reference
from atom.kernels.triton.activation import silu_and_mul
from atom.kernels.triton.launch import vector_tile
from atom.kernels.triton.numerics import round_to

prepare_linear_weight = reference.prepare_linear_weight
prepare_silu_linear_weight = reference.prepare_silu_linear_weight


@triton.jit
def _rows_times_vector(
    weight, x, rows, num_rows, stride_row, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """float32 [ROWS]: weight[rows] @ x."""
    columns = tl.arange(0, COLUMNS)
    at = weight + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    exists = (rows < num_rows)[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, SIZE, COLUMNS):
        if SIZE % COLUMNS == 0:
            w = tl.load(at + start, mask=exists, other=0.0)
            v = tl.load(x + start + columns)
        else:
            left = columns < SIZE - start
            w = tl.load(at + start, mask=exists & left[None, :], other=0.0)
            v = tl.load(x + start + columns, mask=left, other=0.0)
        sums += w.to(tl.float32) * v.to(tl.float32)[None, :]
    return tl.sum(sums, axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def _vector_kernel(
    x, weight, bias, out, num_rows, stride_row, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[r] = weight[r] @ x + bias[r] for ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = _rows_times_vector(weight, x, rows, num_rows, stride_row, SIZE, ROWS, COLUMNS)
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    tl.store(out + rows, round_to(total, out.dtype.element_ty), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_vector_kernel(
    x, weight, out, num_rows, stride_row, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[r] = silu(weight[r] @ x) * (weight[num_rows + r] @ x), rounded where the reference rounds."""
    dtype = out.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate = _rows_times_vector(weight, x, rows, num_rows, stride_row, SIZE, ROWS, COLUMNS)
    half = weight + num_rows.to(tl.int64) * stride_row
    up = _rows_times_vector(half, x, rows, num_rows, stride_row, SIZE, ROWS, COLUMNS)
    gate = round_to(gate, dtype).to(tl.float32)
    activated = round_to(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32)
    result = activated * round_to(up, dtype).to(tl.float32)
    tl.store(out + rows, round_to(result, dtype), mask=rows < num_rows)


def _takes_one_token(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dim() == 2 and x.shape[0] == 1 and x.stride(1) == 1 and weight.stride(1) == 1 and weight.shape[0] > 0


def linear(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_features: int, out_float32: bool = False
) -> torch.Tensor:
    """`atom.kernels.torch.linear.linear`."""
    if is_compiling():  # one op for the compiler, as the number of tokens decides which kernel runs
        return torch.ops.atom.linear(x, prepared, bias, out_features, out_float32)
    if not _takes_one_token(x, prepared):
        return reference.linear(x, prepared, bias, out_features, out_float32)
    size = prepared.shape[1]
    out = torch.empty((1, out_features), dtype=torch.float32 if out_float32 else x.dtype, device=x.device)
    tile = vector_tile(out_features, size, x.element_size())
    _vector_kernel[(triton.cdiv(out_features, tile.rows),)](
        x,
        prepared,
        bias,
        out,
        out_features,
        prepared.stride(0),
        size,
        tile.rows,
        tile.columns,
        num_warps=tile.num_warps,
    )
    return out


def linear_silu_and_mul(x: torch.Tensor, prepared: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """`atom.kernels.torch.linear.linear_silu_and_mul`."""
    if is_compiling():
        return torch.ops.atom.linear_silu_and_mul(x, prepared, intermediate_size)
    if not _takes_one_token(x, prepared):
        return silu_and_mul(F.linear(x, prepared))
    size = prepared.shape[1]
    out = torch.empty((1, intermediate_size), dtype=x.dtype, device=x.device)
    tile = vector_tile(intermediate_size, size, x.element_size())
    _gated_vector_kernel[(triton.cdiv(intermediate_size, tile.rows),)](
        x, prepared, out, intermediate_size, prepared.stride(0), size, tile.rows, tile.columns, num_warps=tile.num_warps
    )
    return out


def _linear_like(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_features: int, out_float32: bool
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.float32 if out_float32 else x.dtype)


_library = torch.library.Library("atom", "FRAGMENT")
_library.define("linear(Tensor x, Tensor prepared, Tensor? bias, int out_features, bool out_float32) -> Tensor")
_library.impl("linear", linear, "CompositeExplicitAutograd")
_library.impl("linear", _linear_like, "Meta")
_library.define("linear_silu_and_mul(Tensor x, Tensor prepared, int intermediate_size) -> Tensor")
_library.impl("linear_silu_and_mul", linear_silu_and_mul, "CompositeExplicitAutograd")
_library.impl("linear_silu_and_mul", lambda x, _, size: x.new_empty((*x.shape[:-1], size)), "Meta")
