"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.launch import next_power_of_2
from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.numerics import round_to

_HEADS = 8  # a program's


@triton.jit
def _rotate(
    x,
    stride_head,
    heads,
    num_heads,
    cos,
    sin,
    pair,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    dtype = x.dtype.element_ty
    if INTERLEAVED:
        first = x + heads[:, None] * stride_head + 2 * pair[None, :]
        second = first + 1
    else:
        first = x + heads[:, None] * stride_head + pair[None, :]
        second = first + HALF
    inside = (heads < num_heads)[:, None] & (pair < HALF)[None, :]
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(second, mask=inside, other=0.0).to(tl.float32)
    # Each product is rounded, as the reference does.
    cos = round_to(cos, dtype).to(tl.float32)[None, :]
    sin = round_to(sin, dtype).to(tl.float32)[None, :]
    rotated_a = round_to(a * cos, dtype).to(tl.float32) - round_to(b * sin, dtype).to(tl.float32)
    rotated_b = round_to(b * cos, dtype).to(tl.float32) + round_to(a * sin, dtype).to(tl.float32)
    tl.store(first, round_to(rotated_a, dtype), mask=inside)
    tl.store(second, round_to(rotated_b, dtype), mask=inside)


@triton.jit
def _rotary_kernel(
    positions,
    query,
    key,
    cos_sin_cache,
    cache_stride,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Program (t, i) rotates HEADS heads of token t: first those of the query, then those of the key."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    pair = tl.arange(0, PADDED)
    entry = cos_sin_cache + tl.load(positions + token) * cache_stride + pair
    cos = tl.load(entry, mask=pair < HALF, other=0.0)
    sin = tl.load(entry + HALF, mask=pair < HALF, other=0.0)
    # Two calls, as AMD's compiler can't follow a pointer that is one of two.
    if block < query_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        x = query + token * query_stride_token
        _rotate(x, query_stride_head, heads, QUERY_HEADS, cos, sin, pair, HALF, INTERLEAVED)
    else:
        heads = (block - query_blocks) * HEADS + tl.arange(0, HEADS)
        y = key + token * key_stride_token
        _rotate(y, key_stride_head, heads, KEY_HEADS, cos, sin, pair, HALF, INTERLEAVED)


_launch_rotary = Launcher(_rotary_kernel)


def rotary_embedding_(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """`atom.kernels.torch.rotary.rotary_embedding_`; heads must be contiguous inside (last stride 1)."""
    tokens, query_heads = query.shape[:2]
    key_heads = key.shape[1]
    half = cos_sin_cache.shape[1] // 2
    assert query.stride(2) == 1
    assert key.stride(2) == 1
    assert query.dtype == key.dtype
    if not tokens:
        return
    _launch_rotary(
        (tokens, cdiv(query_heads, _HEADS) + cdiv(key_heads, _HEADS), 1),
        (positions, query, key, cos_sin_cache),
        (cos_sin_cache.stride(0), query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
        (query_heads, key_heads, half, next_power_of_2(half), _HEADS, interleaved),
        num_warps=2,
    )
