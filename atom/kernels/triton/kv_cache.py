"""Writing keys and values into the paged cache."""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.launch import next_power_of_2
from atom.kernels.triton.launcher import Launcher, cdiv
from atom.kernels.triton.numerics import round_to, scale_rows

_HEADS = 8  # a program's


@triton.jit
def store_heads(
    x,
    cache,
    scales,
    first_row,
    heads,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,
):
    """x: float32 [heads, PADDED], scaled by head where the cache is float8 (FLOAT8_MAX above 0)."""
    columns = tl.arange(0, PADDED)
    inside = (heads < NUM_HEADS)[:, None] & (columns < HEAD_DIM)[None, :]
    if FLOAT8_MAX > 0:
        x, scale = scale_rows(x, FLOAT8_MAX)
        tl.store(scales + (first_row + heads)[:, None], scale, mask=(heads < NUM_HEADS)[:, None])
    target = cache + (first_row + heads)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(target, round_to(x, cache.dtype.element_ty), mask=inside)


@triton.jit
def _store(
    source,
    cache,
    scales,
    first_row,
    heads,
    stride_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,
):
    columns = tl.arange(0, PADDED)
    inside = (heads < NUM_HEADS)[:, None] & (columns < HEAD_DIM)[None, :]
    x = tl.load(source + heads[:, None] * stride_head + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    store_heads(x, cache, scales, first_row, heads, NUM_HEADS, HEAD_DIM, PADDED, FLOAT8_MAX)


@triton.jit
def _store_kv_kernel(
    key,
    value,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slot_mapping,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,
):
    """Program (t, i) stores HEADS heads of token t's key (even i) or value (odd i)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    row = slot * NUM_HEADS
    heads = (tl.program_id(1) // 2) * HEADS + tl.arange(0, HEADS)
    # Two calls, as AMD's compiler can't follow a pointer that is one of two.
    if tl.program_id(1) % 2 == 0:
        x = key + token * key_stride_token
        _store(
            x,
            k_cache,
            k_scale,
            row,
            heads,
            key_stride_head,
            NUM_HEADS,
            HEAD_DIM,
            PADDED,
            FLOAT8_MAX,
        )
    else:
        y = value + token * value_stride_token
        _store(
            y,
            v_cache,
            v_scale,
            row,
            heads,
            value_stride_head,
            NUM_HEADS,
            HEAD_DIM,
            PADDED,
            FLOAT8_MAX,
        )


_launch_store_kv = Launcher(_store_kv_kernel)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """`atom.kernels.torch.kv_cache.store_kv`; caches and scales must be contiguous."""
    tokens, num_heads, head_dim = key.shape
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert key.stride(2) == 1
    assert value.stride(2) == 1
    if not tokens:
        return
    _launch_store_kv(
        (tokens, 2 * cdiv(num_heads, _HEADS), 1),
        (key, value, k_cache, v_cache, k_scale, v_scale, slot_mapping),
        (key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        (
            num_heads,
            head_dim,
            next_power_of_2(head_dim),
            min(_HEADS, next_power_of_2(num_heads)),
            0.0 if k_scale is None else torch.finfo(k_cache.dtype).max,
        ),
        num_warps=2,
    )
