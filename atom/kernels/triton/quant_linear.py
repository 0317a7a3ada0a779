"""Dense layers whose weights and rows are in eight bits; see `atom.kernels.torch.quant_linear`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.compiler import is_compiling

from atom.kernels.torch import quant_linear as reference
from atom.kernels.triton.launch import CHIP, overlap_options, quant_gemm_tile
from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.linear import BAND, tile_in_band
from atom.kernels.triton.numerics import dot, round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs

prepare_quant_weight = reference.prepare_quant_weight


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _quant_gemm_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    out,
    num_tokens,
    num_rows,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BAND: tl.constexpr,
    GROUPED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """M tokens by N rows; GROUPED: K columns share a scale, else all do."""
    let_next_begin(OVERLAP)
    first_token, first_row = tile_in_band(num_tokens, num_rows, M, N, BAND)
    tokens = first_token.to(tl.int64) + tl.arange(0, M)
    rows = first_row.to(tl.int64) + tl.arange(0, N)
    inner = tl.arange(0, K)
    is_token = tokens < num_tokens
    exists = rows < num_rows
    GROUPS: tl.constexpr = (SIZE + K - 1) // K if GROUPED else 1
    at_x = x + tokens[:, None] * SIZE + inner[None, :]
    at = weight + rows[None, :] * SIZE + inner[:, None]
    at_x_scales = x_scales + tokens * GROUPS
    at_scales = weight_scales + rows * GROUPS
    sums = tl.zeros([M, N], tl.float32)
    wait_for_inputs(OVERLAP)
    for start in range(0, SIZE, K):
        left = inner < SIZE - start
        a = tl.load(at_x + start, mask=is_token[:, None] & left[None, :], other=0.0)
        b = tl.load(at + start, mask=exists[None, :] & left[:, None], other=0.0)
        # Added up outside: Hopper's tensor cores keep few bits of what they add float8 products to.
        part = dot(a, b, tl.zeros([M, N], tl.float32))
        if GROUPED:
            x_scale = tl.load(at_x_scales + start // K, mask=is_token, other=0.0)
            scale = tl.load(at_scales + start // K, mask=exists, other=0.0)
            part *= x_scale[:, None] * scale[None, :]
        sums += part
    if not GROUPED:
        sums *= tl.load(at_x_scales, mask=is_token, other=0.0)[:, None]
        sums *= tl.load(at_scales, mask=exists, other=0.0)[None, :]
    if bias is not None:
        sums += tl.load(bias + rows, mask=exists, other=0.0).to(tl.float32)[None, :]
    at_out = out + tokens[:, None] * num_rows + rows[None, :]
    tl.store(at_out, round_to(sums, out.dtype.element_ty), mask=is_token[:, None] & exists[None, :])


_launch_quant_gemm = Launcher(_quant_gemm_kernel)
_COLUMNS = 128  # a step's
_MOST_OF_OURS = 64  # tokens; more are faster in torch's library, where that serves their scales


def quant_linear(
    values: torch.Tensor,
    scales: torch.Tensor,
    prepared: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`atom.kernels.torch.quant_linear.quant_linear`; operands must be contiguous, group_size None or 128."""
    if is_compiling():  # one op for the compiler, as the number of tokens decides the tile
        return torch.ops.atom.quant_linear(
            values, scales, prepared, weight_scales, bias, group_size, out_features, dtype
        )
    assert group_size in (None, _COLUMNS)
    assert all(t.is_contiguous() for t in (values, scales, prepared, weight_scales))
    num_tokens, size = values.shape
    if _is_librarys(values, bias, group_size, out_features, dtype):
        # Without its fast accumulation, whose sums have few bits.
        return torch._scaled_mm(
            values, prepared.t(), scale_a=scales, scale_b=weight_scales.t(), bias=bias, out_dtype=dtype
        )
    out = values.new_empty((num_tokens, out_features), dtype=dtype)
    if num_tokens:
        tile = quant_gemm_tile(num_tokens, out_features)
        _launch_quant_gemm(
            (cdiv(num_tokens, tile.m) * cdiv(out_features, tile.n), 1, 1),
            (values, scales, prepared, weight_scales, bias, out),
            (num_tokens, out_features),
            (size, tile.m, tile.n, _COLUMNS, BAND, group_size is not None),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **overlap_options(values.device),
        )
    return out


def _is_librarys(
    values: torch.Tensor, bias: torch.Tensor | None, group_size: int | None, out_features: int, dtype: torch.dtype
) -> bool:
    """Whether torch's library multiplies: many tokens whose rows have one scale each, on Hopper."""
    return (
        CHIP == "hopper"
        and group_size is None
        and values.shape[0] > _MOST_OF_OURS
        and dtype == torch.bfloat16
        and values.dtype == torch.float8_e4m3fn
        and values.shape[1] % 16 == out_features % 16 == 0
        and (bias is None or bias.dtype == dtype)
        and overlap_options(values.device)["OVERLAP"]
    )


def _quant_linear_like(values: torch.Tensor, *args: Any) -> torch.Tensor:
    *_, out_features, dtype = args
    return values.new_empty((values.shape[0], out_features), dtype=dtype)


_library = torch.library.Library("atom", "FRAGMENT")
_library.define(
    "quant_linear(Tensor values, Tensor scales, Tensor prepared, Tensor weight_scales, Tensor? bias, int? group_size, "
    "int out_features, ScalarType dtype) -> Tensor"
)
_library.impl("quant_linear", quant_linear, "CompositeExplicitAutograd")
_library.impl("quant_linear", _quant_linear_like, "Meta")
