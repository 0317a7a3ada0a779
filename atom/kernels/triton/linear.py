"""Dense layers.

A few tokens' product is bound by reading the weights. One token's is a matrix-vector product: a program multiplies a
few rows and sums them once. Up to MOST_FEW_TOKENS are one tile of a matrix product. In both the activation is part of
the kernel, and nothing needs a second pass over partial sums. More tokens are torch's own matrix product, or the same
kernel in many tiles with ATOM_USE_TRITON_GEMM=1.
"""

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.compiler import is_compiling

from atom.kernels.torch import linear as reference
from atom.kernels.triton.activation import silu_and_mul, silu_times
from atom.kernels.triton.launch import gemm_tile, overlap_options, vector_tile
from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.numerics import dot, round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs
from atom.utils import envs

prepare_linear_weight = reference.prepare_linear_weight
prepare_silu_linear_weight = reference.prepare_silu_linear_weight

MOST_FEW_TOKENS = 16
BAND = 8  # tiles of tokens that go over the weights together


@triton.jit(do_not_specialize=["num_rows"])
def _vector_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    stride_row,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[r] = weight[r] @ x + bias[r] for ROWS rows; GATED: silu(that) * (weight[num_rows + r] @ x), without bias."""
    let_next_begin(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < num_rows)[:, None]
    at = weight + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    at_up = at + num_rows.to(tl.int64) * stride_row
    # The first weights are on their way before x is known.
    first = tl.load(at, mask=exists & (columns < SIZE)[None, :], other=0.0).to(tl.float32)
    if GATED:
        first_up = tl.load(at_up, mask=exists & (columns < SIZE)[None, :], other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    v = tl.load(x + columns, mask=columns < SIZE, other=0.0).to(tl.float32)[None, :]
    sums = first * v
    if GATED:
        up_sums = first_up * v
    for start in range(COLUMNS, SIZE, COLUMNS):
        left = columns < SIZE - start
        v = tl.load(x + start + columns, mask=left, other=0.0).to(tl.float32)[None, :]
        sums += tl.load(at + start, mask=exists & left[None, :], other=0.0).to(tl.float32) * v
        if GATED:
            up_sums += tl.load(at_up + start, mask=exists & left[None, :], other=0.0).to(tl.float32) * v
    result = tl.sum(sums, axis=1)
    if GATED:
        result = silu_times(result, tl.sum(up_sums, axis=1), out.dtype.element_ty)
    if bias is not None:
        result += tl.load(bias + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    tl.store(out + rows, round_to(result, out.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def tile_in_band(num_tokens, num_rows, M: tl.constexpr, N: tl.constexpr, BAND: tl.constexpr):
    """(this program's first token, its first row); programs that run at the same time share weights in the cache."""
    band_programs = BAND * tl.cdiv(num_rows, N)
    band = tl.program_id(0) // band_programs
    height = tl.minimum(tl.cdiv(num_tokens, M) - band * BAND, BAND)
    place = tl.program_id(0) % band_programs
    return (band * BAND + place % height) * M, place // height * N


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _gemm_kernel(
    x,
    weight,
    bias,
    out,
    num_tokens,
    num_rows,
    stride_x,
    stride_row,
    stride_out,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BAND: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """As `_vector_kernel` for M tokens and N rows."""
    let_next_begin(OVERLAP)
    first_token, first_row = tile_in_band(num_tokens, num_rows, M, N, BAND)
    tokens = first_token.to(tl.int64) + tl.arange(0, M)
    rows = first_row + tl.arange(0, N)
    inner = tl.arange(0, K)
    is_token = (tokens < num_tokens)[:, None]
    exists = (rows < num_rows)[None, :]
    at_x = x + tokens[:, None] * stride_x + inner[None, :]
    at = weight + rows.to(tl.int64)[None, :] * stride_row + inner[:, None]
    at_up = at + num_rows.to(tl.int64) * stride_row
    sums = tl.zeros([M, N], tl.float32)
    if GATED:
        up_sums = tl.zeros([M, N], tl.float32)
    wait_for_inputs(OVERLAP)
    for start in range(0, SIZE, K):
        if SIZE % K == 0:
            a = tl.load(at_x + start, mask=is_token, other=0.0)
            sums = dot(a, tl.load(at + start, mask=exists, other=0.0), sums)
            if GATED:
                up_sums = dot(a, tl.load(at_up + start, mask=exists, other=0.0), up_sums)
        else:
            left = inner < SIZE - start
            a = tl.load(at_x + start, mask=is_token & left[None, :], other=0.0)
            sums = dot(a, tl.load(at + start, mask=exists & left[:, None], other=0.0), sums)
            if GATED:
                up_sums = dot(a, tl.load(at_up + start, mask=exists & left[:, None], other=0.0), up_sums)
    if GATED:
        sums = silu_times(sums, up_sums, out.dtype.element_ty)
    if bias is not None:
        sums += tl.load(bias + rows, mask=rows < num_rows, other=0.0).to(tl.float32)[None, :]
    at_out = out + tokens[:, None] * stride_out + rows[None, :]
    tl.store(at_out, round_to(sums, out.dtype.element_ty), mask=is_token & exists)


_launch_vector = Launcher(_vector_kernel)
_launch_gemm = Launcher(_gemm_kernel)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_rows: int, gated: bool, dtype: torch.dtype
) -> torch.Tensor:
    """x [T, K] times weight [num_rows, K], or gate above up if gated."""
    num_tokens, size = x.shape
    num_outputs = 2 if gated else 1
    out = x.new_empty((num_tokens, num_rows), dtype=dtype)
    if num_tokens == 1:
        rows = vector_tile(x.element_size(), num_outputs)
        _launch_vector(
            (cdiv(num_rows, rows.rows), 1, 1),
            (x, weight, bias, out),
            (num_rows, weight.stride(0)),
            (size, rows.rows, rows.columns, gated),
            num_warps=rows.num_warps,
            **overlap_options(x.device),
        )
        return out
    tile = gemm_tile(num_tokens, x.element_size(), num_outputs)
    _launch_gemm(
        (cdiv(num_tokens, tile.m) * cdiv(num_rows, tile.n), 1, 1),
        (x, weight, bias, out),
        (num_tokens, num_rows, x.stride(0), weight.stride(0), num_rows),
        (size, tile.m, tile.n, tile.k, BAND, gated),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap_options(x.device),
    )
    return out


@cache
def always_ours() -> bool:
    """ATOM_USE_TRITON_GEMM, read once, as each layer of each step asks."""
    return envs.ATOM_USE_TRITON_GEMM


def _is_ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether our kernels multiply, rather than torch's library."""
    if x.dim() != 2 or not x.shape[0] or x.stride(1) != 1 or weight.stride(1) != 1:
        return False
    return x.shape[0] <= MOST_FEW_TOKENS or always_ours()


def linear(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_features: int, out_float32: bool = False
) -> torch.Tensor:
    """`atom.kernels.torch.linear.linear`."""
    if is_compiling():  # one op for the compiler, as the number of tokens decides which kernel runs
        return torch.ops.atom.linear(x, prepared, bias, out_features, out_float32)
    if _is_ours(x, prepared):
        return _multiply(x, prepared, bias, out_features, False, torch.float32 if out_float32 else x.dtype)
    if out_float32 and bias is None and x.dim() == 2 and x.is_cuda and x.element_size() == 2 and not torch.version.hip:
        return torch.mm(x, prepared.t(), out_dtype=torch.float32)  # no second pass over large logits
    return reference.linear(x, prepared, bias, out_features, out_float32)


def linear_silu_and_mul(x: torch.Tensor, prepared: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """`atom.kernels.torch.linear.linear_silu_and_mul`."""
    if is_compiling():
        return torch.ops.atom.linear_silu_and_mul(x, prepared, intermediate_size)
    if _is_ours(x, prepared):
        return _multiply(x, prepared, None, intermediate_size, True, x.dtype)
    return silu_and_mul(F.linear(x, prepared))


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
