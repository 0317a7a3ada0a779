"""Routing of tokens to experts, and the order in which the experts' products take them."""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.launch import next_power_of_2, overlap_options
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs

_MOST_PAIRS_AT_ONCE = 4096  # of a program that orders


@triton.jit
def _route_kernel(
    router_logits,
    weights,
    ids,
    stride,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    PADDED_CHOICES: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token: its CHOICES largest logits, one after the other; of equal ones the lowest expert."""
    let_next_begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, PADDED_EXPERTS)
    choices = tl.arange(0, PADDED_CHOICES)
    wait_for_inputs(OVERLAP)
    logits = tl.load(router_logits + token * stride + experts, mask=experts < EXPERTS, other=float("-inf"))
    logits = logits.to(tl.float32)
    powers = tl.exp(logits - tl.max(logits, axis=0))
    probabilities = powers / tl.sum(powers, axis=0)
    chosen_weights = tl.zeros([PADDED_CHOICES], tl.float32)
    chosen = tl.zeros([PADDED_CHOICES], tl.int32)
    left = experts < EXPERTS
    for choice in range(CHOICES):
        best = tl.max(tl.where(left, logits, float("-inf")), axis=0)
        expert = tl.min(tl.where(left & (logits == best), experts, PADDED_EXPERTS), axis=0)
        expert = tl.minimum(expert, EXPERTS - 1)  # logits that are not numbers equal nothing
        weight = tl.sum(tl.where(experts == expert, probabilities, 0.0), axis=0)
        chosen = tl.where(choices == choice, expert, chosen)
        chosen_weights = tl.where(choices == choice, weight, chosen_weights)
        left = left & (experts != expert)
    if RENORMALIZE:
        chosen_weights = chosen_weights / tl.sum(chosen_weights, axis=0)
    tl.store(weights + token * CHOICES + choices, chosen_weights, mask=choices < CHOICES)
    tl.store(ids + token * CHOICES + choices, chosen, mask=choices < CHOICES)


def route_experts(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`atom.kernels.torch.routing.route_experts`; of equal experts the lowest ids win."""
    tokens, num_experts = router_logits.shape
    assert router_logits.stride(1) == 1
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=router_logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=router_logits.device)
    if tokens:
        _route_kernel[(tokens,)](
            router_logits,
            weights,
            ids,
            router_logits.stride(0),
            num_experts,
            next_power_of_2(num_experts),
            top_k,
            next_power_of_2(top_k),
            renormalize,
            num_warps=1,
            **overlap_options(router_logits.device),
        )
    return weights, ids


@triton.jit(do_not_specialize=["num_pairs"])
def _order_kernel(ids, pairs, offsets, num_pairs, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One expert: where its pairs begin, and which they are, in rising order. A last program writes the end."""
    let_next_begin(OVERLAP)
    expert = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    wait_for_inputs(OVERLAP)
    for start in range(0, num_pairs, BLOCK):
        inside = start + columns < num_pairs
        before += (tl.load(ids + start + columns, mask=inside, other=2147483647) < expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    tl.store(offsets + expert, place)
    for start in range(0, num_pairs, BLOCK):
        inside = start + columns < num_pairs
        mine = (tl.load(ids + start + columns, mask=inside, other=-1) == expert).to(tl.int32)
        tl.store(pairs + place + tl.cumsum(mine, axis=0) - 1, start + columns, mask=mine == 1)
        place += tl.sum(mine, axis=0)


def order_by_expert(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_ids [T, K], contiguous -> (pairs int32 [T * K], offsets int32 [num_experts + 1]).

    Pair t * K + k is token t's choice k; expert e's are pairs[offsets[e]:offsets[e + 1]].
    """
    num_pairs = topk_ids.numel()
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=topk_ids.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=topk_ids.device)
    block = min(_MOST_PAIRS_AT_ONCE, max(32, next_power_of_2(num_pairs)))
    _order_kernel[(num_experts + 1,)](
        topk_ids,
        pairs,
        offsets,
        num_pairs,
        block,
        num_warps=4 if block < 2048 else 8,
        **overlap_options(topk_ids.device),
    )
    return pairs, offsets
