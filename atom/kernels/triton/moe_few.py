"""Mixture of experts for a few tokens, which share few experts: two matrix-vector products without any sorting."""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.activation import silu_times
from atom.kernels.triton.launch import expert_vector_tile, experts_vector_tile, next_power_of_2, overlap_options
from atom.kernels.triton.numerics import round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs


@triton.jit
def _few_gate_up_kernel(
    x,
    w13,
    topk_ids,
    hidden,
    stride_x,
    stride_expert,
    stride_row,
    SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[pair, r] = silu(gate[r] @ x) * (up[r] @ x) for ROWS rows of the pair's expert."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exists = (rows < INTERMEDIATE)[:, None]
    wait_for_inputs(OVERLAP)
    let_next_begin(OVERLAP)  # not before: the next kernel reads topk_ids without waiting
    expert = tl.load(topk_ids + pair).to(tl.int64)
    at = w13 + expert * stride_expert + rows[:, None] * stride_row + columns[None, :]
    at_up = at + INTERMEDIATE * stride_row
    at_x = x + pair // CHOICES * stride_x + columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.static_range(0, SIZE, COLUMNS):
        inside = columns < SIZE - start
        v = tl.load(at_x + start, mask=inside, other=0.0).to(tl.float32)[None, :]
        sums += tl.load(at + start, mask=exists & inside[None, :], other=0.0).to(tl.float32) * v
        up_sums += tl.load(at_up + start, mask=exists & inside[None, :], other=0.0).to(tl.float32) * v
    result = silu_times(tl.sum(sums, axis=1), tl.sum(up_sums, axis=1), hidden.dtype.element_ty)
    target = hidden + pair * INTERMEDIATE + rows
    tl.store(target, round_to(result, hidden.dtype.element_ty), mask=rows < INTERMEDIATE)


@triton.jit
def _few_down_kernel(
    hidden,
    w2,
    topk_weights,
    topk_ids,
    out,
    stride_expert,
    stride_row,
    SIZE: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    CHOICES: tl.constexpr,
    PADDED_CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, r] = sum over k of topk_weights[t, k] * (w2[expert k][r] @ hidden[t, k]) for ROWS rows.

    All experts' rows are one tile, so that none is read after another. Must follow `_few_gate_up_kernel`.
    """
    let_next_begin(OVERLAP)
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    choices = tl.arange(0, PADDED_CHOICES)
    pairs = token * CHOICES + choices
    chosen = choices < CHOICES
    exists = chosen[:, None, None] & (rows < SIZE)[None, :, None]
    # Past the first-level cache, which may hold another layer's. The first weights are on their way before hidden is.
    experts = tl.load(topk_ids + pairs, mask=chosen, other=0, cache_modifier=".cg").to(tl.int64)
    at = w2 + (experts * stride_expert)[:, None, None] + (rows * stride_row)[None, :, None] + columns[None, None, :]
    first = tl.load(at, mask=exists & (columns < INTERMEDIATE)[None, None, :], other=0.0)
    wait_for_inputs(OVERLAP)
    at_hidden = hidden + pairs[:, None] * INTERMEDIATE + columns[None, :]
    v = tl.load(at_hidden, mask=chosen[:, None] & (columns < INTERMEDIATE)[None, :], other=0.0)
    sums = first.to(tl.float32) * v.to(tl.float32)[:, None, :]
    for start in tl.static_range(COLUMNS, INTERMEDIATE, COLUMNS):
        left = columns < INTERMEDIATE - start
        v = tl.load(at_hidden + start, mask=chosen[:, None] & left[None, :], other=0.0)
        part = tl.load(at + start, mask=exists & left[None, None, :], other=0.0)
        sums += part.to(tl.float32) * v.to(tl.float32)[:, None, :]
    # Each expert's product is rounded, as the reference does.
    products = round_to(tl.sum(sums, axis=2), out.dtype.element_ty).to(tl.float32)
    weights = tl.load(topk_weights + pairs, mask=chosen, other=0.0)
    total = tl.sum(products * weights[:, None], axis=0)
    tl.store(out + token * SIZE + rows, round_to(total, out.dtype.element_ty), mask=rows < SIZE)


def few_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """`atom.kernels.torch.moe.fused_experts`: reads an expert's weights anew for each pair of token and choice.

    topk_weights and topk_ids must be contiguous, and so must the weights' last dimension.
    """
    tokens, size = x.shape
    intermediate = w2.shape[2]
    choices = topk_ids.shape[1]
    hidden = torch.empty((tokens * choices, intermediate), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    overlap = overlap_options(x.device)
    tile = expert_vector_tile(x.element_size(), size)
    _few_gate_up_kernel[(triton.cdiv(intermediate, tile.rows), tokens * choices)](
        x,
        w13,
        topk_ids,
        hidden,
        x.stride(0),
        w13.stride(0),
        w13.stride(1),
        size,
        intermediate,
        choices,
        tile.rows,
        tile.columns,
        num_warps=tile.num_warps,
        **overlap,
    )
    tile = experts_vector_tile(x.element_size(), choices)
    _few_down_kernel[(triton.cdiv(size, tile.rows), tokens)](
        hidden,
        w2,
        topk_weights,
        topk_ids,
        out,
        w2.stride(0),
        w2.stride(1),
        size,
        intermediate,
        choices,
        next_power_of_2(choices),
        tile.rows,
        tile.columns,
        num_warps=tile.num_warps,
        **overlap,
    )
    return out
