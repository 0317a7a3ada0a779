"""Mixture of experts as two matrix products grouped by expert.

Tokens are ordered by expert, so that each tile of a product reads one expert's weights; a tile finds
its expert by binary search on the device, and the host never learns how many tokens an expert got.
A few tokens go another way: see `moe_few`.
"""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.activation import silu_times
from atom.kernels.triton.launch import grouped_gemm_tile, next_power_of_2
from atom.kernels.triton.moe_few import few_experts
from atom.kernels.triton.numerics import dot, round_to
from atom.kernels.triton.routing import order_by_expert

# Up to so many, few tokens choose the same expert, whose weights would be read for each of them.
_FEW_PAIRS_PER_EXPERT = 0.5


@triton.jit
def _find_tile(offsets, tile, num_experts, M: tl.constexpr):
    """(expert, first row, end row) of a tile. Expert e owns the tiles from offsets[e] // M + e on."""
    low = tile * 0
    high = num_experts - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(offsets + middle) // M + middle <= tile:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(offsets + low)
    end = tl.load(offsets + low + 1)
    return low, begin + (tile - begin // M - low) * M, end


@triton.jit(do_not_specialize=["num_experts"])
def _gate_up_kernel(
    x,
    w13,
    hidden,
    pairs,
    offsets,
    num_experts,
    stride_x,
    stride_expert,
    stride_row,
    SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    CHOICES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """hidden[r] = silu(gate) * up for sorted row r, whose token is pairs[r] // CHOICES."""
    expert, first_row, end_row = _find_tile(offsets, tl.program_id(1), num_experts, M)
    if first_row >= end_row:
        return
    rows = first_row + tl.arange(0, M)
    real = rows < end_row
    token = tl.load(pairs + rows, mask=real, other=0).to(tl.int64) // CHOICES
    columns = tl.program_id(0) * N + tl.arange(0, N)
    wanted = columns < INTERMEDIATE
    weights = w13 + expert.to(tl.int64) * stride_expert
    inner = tl.arange(0, K)
    at_x = x + token[:, None] * stride_x + inner[None, :]
    at_gate = weights + columns[None, :] * stride_row + inner[:, None]
    at_up = at_gate + INTERMEDIATE * stride_row
    gate = tl.zeros([M, N], tl.float32)
    up = tl.zeros([M, N], tl.float32)
    for start in range(0, SIZE, K):
        if SIZE % K == 0:
            a = tl.load(at_x, mask=real[:, None], other=0.0)
            b = tl.load(at_gate, mask=wanted[None, :], other=0.0)
            c = tl.load(at_up, mask=wanted[None, :], other=0.0)
        else:
            left = inner < SIZE - start
            a = tl.load(at_x, mask=real[:, None] & left[None, :], other=0.0)
            b = tl.load(at_gate, mask=wanted[None, :] & left[:, None], other=0.0)
            c = tl.load(at_up, mask=wanted[None, :] & left[:, None], other=0.0)
        gate = dot(a, b, gate)
        up = dot(a, c, up)
        at_x += K
        at_gate += K
        at_up += K
    dtype = hidden.dtype.element_ty
    target = hidden + rows.to(tl.int64)[:, None] * INTERMEDIATE + columns[None, :]
    tl.store(target, round_to(silu_times(gate, up, dtype), dtype), mask=real[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["num_experts"])
def _down_kernel(
    hidden,
    w2,
    products,
    pairs,
    offsets,
    num_experts,
    stride_expert,
    stride_row,
    SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """products[pairs[r]] = hidden[r] @ w2[expert].T: back in the order of tokens and choices."""
    expert, first_row, end_row = _find_tile(offsets, tl.program_id(1), num_experts, M)
    if first_row >= end_row:
        return
    rows = first_row + tl.arange(0, M)
    real = rows < end_row
    columns = tl.program_id(0) * N + tl.arange(0, N)
    wanted = columns < SIZE
    inner = tl.arange(0, K)
    at_hidden = hidden + rows.to(tl.int64)[:, None] * INTERMEDIATE + inner[None, :]
    at_weight = w2 + expert.to(tl.int64) * stride_expert + columns[None, :] * stride_row + inner[:, None]
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, INTERMEDIATE, K):
        if INTERMEDIATE % K == 0:
            a = tl.load(at_hidden, mask=real[:, None], other=0.0)
            b = tl.load(at_weight, mask=wanted[None, :], other=0.0)
        else:
            left = inner < INTERMEDIATE - start
            a = tl.load(at_hidden, mask=real[:, None] & left[None, :], other=0.0)
            b = tl.load(at_weight, mask=wanted[None, :] & left[:, None], other=0.0)
        acc = dot(a, b, acc)
        at_hidden += K
        at_weight += K
    pair = tl.load(pairs + rows, mask=real, other=0).to(tl.int64)
    target = products + pair[:, None] * SIZE + columns[None, :]
    tl.store(target, round_to(acc, products.dtype.element_ty), mask=real[:, None] & wanted[None, :])


@triton.jit
def _combine_kernel(
    products, topk_weights, out, SIZE: tl.constexpr, CHOICES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = sum over k of topk_weights[t, k] * products[t, k], in float32."""
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, PADDED)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (choice < CHOICES)[:, None] & (columns < SIZE)[None, :]
    pair = token * CHOICES + choice
    weight = tl.load(topk_weights + pair, mask=choice < CHOICES, other=0.0)
    values = tl.load(products + pair[:, None] * SIZE + columns[None, :], mask=inside, other=0.0)
    total = tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
    tl.store(out + token * SIZE + columns, round_to(total, out.dtype.element_ty), mask=columns < SIZE)


def fused_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """`atom.kernels.torch.moe.fused_experts`; weights' last dimension must be contiguous."""
    tokens, size = x.shape
    num_experts, _, intermediate = w2.shape
    choices = topk_ids.shape[1]
    num_pairs = tokens * choices
    if not tokens:
        return torch.empty_like(x)
    assert x.stride(1) == w13.stride(2) == w2.stride(2) == 1
    topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
    if num_pairs <= num_experts * _FEW_PAIRS_PER_EXPERT:
        return few_experts(x, w13, w2, topk_weights, topk_ids)
    pairs, offsets = order_by_expert(topk_ids, num_experts)
    out = torch.empty_like(x)

    rows = next_power_of_2(triton.cdiv(num_pairs, num_experts))
    tile = grouped_gemm_tile(rows, x.element_size(), 2)
    hidden = torch.empty((num_pairs, intermediate), dtype=x.dtype, device=x.device)
    _gate_up_kernel[(triton.cdiv(intermediate, tile.n), num_pairs // tile.m + num_experts)](
        x,
        w13,
        hidden,
        pairs,
        offsets,
        num_experts,
        x.stride(0),
        w13.stride(0),
        w13.stride(1),
        size,
        intermediate,
        choices,
        tile.m,
        tile.n,
        tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    tile = grouped_gemm_tile(rows, x.element_size(), 1)
    products = torch.empty((num_pairs, size), dtype=x.dtype, device=x.device)
    _down_kernel[(triton.cdiv(size, tile.n), num_pairs // tile.m + num_experts)](
        hidden,
        w2,
        products,
        pairs,
        offsets,
        num_experts,
        w2.stride(0),
        w2.stride(1),
        size,
        intermediate,
        tile.m,
        tile.n,
        tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    block = 1024
    _combine_kernel[(tokens, triton.cdiv(size, block))](
        products, topk_weights, out, size, choices, next_power_of_2(choices), block, num_warps=4
    )
    return out
