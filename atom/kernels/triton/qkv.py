"""Norm and rotation of query and key heads and the cache write, in one launch."""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.kv_cache import store_heads
from atom.kernels.triton.launch import next_power_of_2, overlap_options
from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.numerics import round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs

_HEADS = 4  # a program's


@triton.jit
def _normed_and_rotated(
    x,
    weight,
    entry,
    heads,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """float32 [heads, PADDED], rounded to x's type wherever the reference rounds."""
    dtype = x.dtype.element_ty
    columns = tl.arange(0, PADDED)
    rotated = columns < 2 * HALF
    # Each column's partner in the rotation, read once more (from the first cache) instead of shuffled.
    if INTERLEAVED:
        is_first = columns % 2 == 0
        partners = tl.where(rotated, columns ^ 1, columns)
        angles = columns // 2
    else:
        is_first = columns < HALF
        partners = tl.where(is_first, columns + HALF, tl.where(rotated, columns - HALF, columns))
        angles = tl.where(is_first, columns, columns - HALF)
    exists = columns < HEAD_DIM
    inside = (heads < NUM_HEADS)[:, None] & exists[None, :]
    rows = x + heads[:, None] * HEAD_DIM
    if weight is not None:
        own_gain = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
        other_gain = tl.load(weight + partners, mask=exists, other=0.0).to(tl.float32)[None, :]
    cos = round_to(tl.load(entry + angles, mask=rotated, other=1.0), dtype).to(tl.float32)
    sin = round_to(tl.load(entry + HALF + angles, mask=rotated, other=0.0), dtype).to(tl.float32)
    wait_for_inputs(OVERLAP)  # of which x is the first
    own = tl.load(rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(rows + partners[None, :], mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        factor = tl.rsqrt(tl.sum(own * own, axis=1) / HEAD_DIM + eps)[:, None]
        own = round_to(round_to(own * factor, dtype).to(tl.float32) * own_gain, dtype).to(tl.float32)
        other = round_to(round_to(other * factor, dtype).to(tl.float32) * other_gain, dtype).to(tl.float32)
    sin = tl.where(is_first, -sin, sin)
    along = round_to(own * cos[None, :], dtype).to(tl.float32)
    across = round_to(other * sin[None, :], dtype).to(tl.float32)
    return round_to(along + across, dtype).to(tl.float32)


@triton.jit
def _qk_norm_rope_cache_kernel(
    qkv,
    query,
    positions,
    cos_sin_cache,
    q_weight,
    k_weight,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slot_mapping,
    qkv_stride,
    query_stride,
    cos_sin_stride,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (t, i) does HEADS heads of token t: the query's first, then the key's, then the value's."""
    let_next_begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    columns = tl.arange(0, PADDED)
    x = qkv + token * qkv_stride
    entry = cos_sin_cache + tl.load(positions + token) * cos_sin_stride
    if block < query_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        out = _normed_and_rotated(
            x, q_weight, entry, heads, eps, QUERY_HEADS, HEAD_DIM, PADDED, HALF, INTERLEAVED, OVERLAP
        )
        target = query + token * query_stride + heads[:, None] * HEAD_DIM + columns[None, :]
        inside = (heads < QUERY_HEADS)[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(target, round_to(out, query.dtype.element_ty), mask=inside)
        return
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return  # the query's programs wait
    row = slot * KV_HEADS
    if block < query_blocks + kv_blocks:
        heads = (block - query_blocks) * HEADS + tl.arange(0, HEADS)
        key = _normed_and_rotated(
            x + QUERY_HEADS * HEAD_DIM,
            k_weight,
            entry,
            heads,
            eps,
            KV_HEADS,
            HEAD_DIM,
            PADDED,
            HALF,
            INTERLEAVED,
            OVERLAP,
        )
        store_heads(key, k_cache, k_scale, row, heads, KV_HEADS, HEAD_DIM, PADDED, FLOAT8_MAX)
    else:
        heads = (block - query_blocks - kv_blocks) * HEADS + tl.arange(0, HEADS)
        source = x + (QUERY_HEADS + KV_HEADS + heads)[:, None] * HEAD_DIM + columns[None, :]
        inside = (heads < KV_HEADS)[:, None] & (columns < HEAD_DIM)[None, :]
        wait_for_inputs(OVERLAP)
        value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        store_heads(value, v_cache, v_scale, row, heads, KV_HEADS, HEAD_DIM, PADDED, FLOAT8_MAX)


_launch_qk_norm_rope_cache = Launcher(_qk_norm_rope_cache_kernel)


def qk_norm_rope_cache(
    qkv: torch.Tensor,
    query: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """`atom.kernels.torch.qkv.qk_norm_rope_cache`; a token's heads, caches and scales must be contiguous."""
    tokens, query_heads, head_dim = query.shape
    kv_heads = k_cache.shape[2]
    for heads in (qkv, query):
        assert heads.stride()[1:] == (head_dim, 1)
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert (q_weight is None) == (k_weight is None)
    if not tokens:
        return
    blocks = cdiv(query_heads, _HEADS) + 2 * cdiv(kv_heads, _HEADS)
    _launch_qk_norm_rope_cache(
        (tokens, blocks, 1),
        (
            qkv,
            query,
            positions,
            cos_sin_cache,
            q_weight,
            k_weight,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            slot_mapping,
        ),
        (qkv.stride(0), query.stride(0), cos_sin_cache.stride(0), eps),
        (
            query_heads,
            kv_heads,
            head_dim,
            next_power_of_2(head_dim),
            cos_sin_cache.shape[1] // 2,
            _HEADS,
            interleaved,
            0.0 if k_scale is None else torch.finfo(k_cache.dtype).max,
        ),
        num_warps=2,
        **overlap_options(qkv.device),
    )
