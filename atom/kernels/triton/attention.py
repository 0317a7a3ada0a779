"""Attention over the paged cache.

Decodes split each request's keys over several programs and merge the parts (Flash-Decoding,
https://pytorch.org/blog/flash-decoding); longer queries run one program for a tile of query tokens
and all query heads of a key head (FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691).
Sizes are decided on the host from numbers it knows; nothing here waits for the device.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

from atom.kernels.triton.decode_merge import MOST_COUNTERS, arrivals, arrives_last, merge, merge_parts, parts_at_once
from atom.kernels.triton.decode_rows import MOST_HEADS, decode_rows_kernel
from atom.kernels.triton.decode_split import LEAST_KEYS, LONG_KEYS, first_key, split_length
from atom.kernels.triton.launch import (
    CHIP,
    DECODE_FLOAT8_TILE,
    decode_rows_tile,
    decode_tile,
    next_power_of_2,
    num_multiprocessors,
    overlap_options,
    prefill_tile,
)
from atom.kernels.triton.launcher import Launcher
from atom.kernels.triton.numerics import dot, round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs

if CHIP == "hopper":
    from atom.kernels.triton import decode_float8

_LOG2_E = math.log2(math.e)
_PROGRAMS_PER_MULTIPROCESSOR = 8  # that decodes should have, so that none waits long for the last
_PROGRAMS_OF_FEW = 2  # where each more is a part more to merge
_MOST_LONG_SPLITS = 9  # of a request that is only cut because it is long: programs that find nothing to do cost time
_MOST_KEYS = 4096  # of a part, however many there are
_MAX_SPLITS = 128
_MOST_MERGED_HEADS = 2  # a key head, whose parts one program merges sooner than a kernel of its own begins
_MOST_WHOLE_PARTS_HEADS = 4  # a key head, to read a short part as one tile: with 8, long contexts were slower
_REQUESTS = 256  # looked at at a time for the one whose tile a program computes


@triton.jit
def _attend_tile(
    q,
    top,
    total,
    acc,
    keys_at,
    query_position,
    limit,
    scale,
    table,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    kv_head,
    stride_block,
    stride_token,
    stride_head,
    scale_stride_block,
    scale_stride_token,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One online-softmax step of q [M, PADDED] over the keys at positions keys_at [N].

    scale > 0 includes log2(e). BOUNDED: there are no keys at positions >= limit. CAUSAL: query_position [M]
    and the window say which keys a row sees. Returns the new (top, total, acc).
    """
    columns = tl.arange(0, PADDED)
    if BOUNDED:
        block = tl.load(table + keys_at // BLOCK_SIZE, mask=keys_at < limit, other=0).to(tl.int64)
    else:
        block = tl.load(table + keys_at // BLOCK_SIZE).to(tl.int64)
    token = keys_at % BLOCK_SIZE
    rows = block * stride_block + token * stride_token + kv_head * stride_head
    address = rows[:, None] + columns[None, :]
    # What lies past a request's end may be NaN: it is not read.
    if BOUNDED:
        inside = (keys_at < limit)[:, None] & (columns < HEAD_DIM)[None, :]
        k = tl.load(k_cache + address, mask=inside, other=0.0)
        v = tl.load(v_cache + address, mask=inside, other=0.0)
    elif HEAD_DIM < PADDED:
        k = tl.load(k_cache + address, mask=(columns < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_cache + address, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_cache + address)
        v = tl.load(v_cache + address)
    scores = dot(q, tl.trans(k.to(q.dtype)), tl.zeros([q.shape[0], keys_at.shape[0]], tl.float32))
    if SCALED:
        at_scale = block * scale_stride_block + token * scale_stride_token + kv_head
        scores = scores * tl.load(k_scale + at_scale, mask=keys_at < limit, other=0.0)[None, :]
    if CAUSAL:
        seen = (keys_at[None, :] <= query_position[:, None]) & (keys_at < limit)[None, :]
        if WINDOW > 0:
            seen = seen & (keys_at[None, :] > query_position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    elif BOUNDED:
        scores = tl.where((keys_at < limit)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    # A row that has seen nothing yet must not subtract infinities.
    reference = new_top
    if CAUSAL:
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale - reference[:, None])
    fade = tl.exp2(top - reference)
    total = total * fade + tl.sum(p, axis=1)
    if SCALED:
        p = p * tl.load(v_scale + at_scale, mask=keys_at < limit, other=0.0)[None, :]
    acc = dot(round_to(p, q.dtype), v.to(q.dtype), acc * fade[:, None])
    return new_top, total, acc


@triton.jit(do_not_specialize=["table_stride", "fill", "num_splits"])
def _decode_kernel(
    query,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    seq_lens,
    block_table,
    output,
    parts,
    parts_log,
    counters,
    scale,
    table_stride,
    fill,
    num_splits,
    query_stride_token,
    query_stride_head,
    output_stride_token,
    output_stride_head,
    stride_block,
    stride_token,
    stride_head,
    scale_stride_block,
    scale_stride_token,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    MERGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (kv_head, request, split): GROUP query heads, padded to HEADS, over the split's keys.

    The normalized result of a part of the keys and its log2-sum-exp2 go to parts [R, Hq, splits, D] and
    parts_log [R, Hq, splits], a result of all keys to the output. MERGES: the request's last program merges its parts.
    """
    let_next_begin(OVERLAP)
    kv_head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens + request)
    first = first_key(seq_len, WINDOW)
    length = split_length(seq_len - first, fill, num_splits, KEYS)
    begin = first + split * length
    end = tl.minimum(begin + length, seq_len)
    wait_for_inputs(OVERLAP)
    if (begin >= end) & (split > 0):  # a request of no keys has one part: its output is zero
        return
    group = tl.arange(0, HEADS)
    columns = tl.arange(0, PADDED)
    heads = kv_head * GROUP + group
    inside = (group < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    at_query = query + request * query_stride_token + heads[:, None] * query_stride_head + columns[None, :]
    q = tl.load(at_query, mask=inside, other=0.0)
    if SCALED and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # float8 keys become float16 in one instruction, bfloat16 in several
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, PADDED], tl.float32)
    table = block_table + request * table_stride
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        top, total, acc = _attend_tile(
            q,
            top,
            total,
            acc,
            start + tl.arange(0, KEYS),
            end,
            end,
            scale,
            table,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            kv_head,
            stride_block,
            stride_token,
            stride_head,
            scale_stride_block,
            scale_stride_token,
            BLOCK_SIZE,
            HEAD_DIM,
            PADDED,
            0,
            SCALED,
            True,
            False,
        )
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = output + request * output_stride_token + kv_head * GROUP * output_stride_head
    if length < seq_len - first:
        place = request * tl.num_programs(0) + kv_head
        row = (place * GROUP + group) * num_splits + split
        tl.store(parts_log + row, top + tl.log2(total), mask=group < GROUP)
        tl.store(parts + row[:, None] * HEAD_DIM + columns[None, :], acc, mask=inside)
        if MERGES:
            num_parts = tl.cdiv(seq_len - first, length)
            if arrives_last(counters + place, num_parts):
                merge_parts(
                    parts,
                    parts_log,
                    place * GROUP * num_splits,
                    num_splits,
                    num_parts,
                    target,
                    output_stride_head,
                    GROUP,
                    PADDED_GROUP,
                    HEAD_DIM,
                    PADDED,
                    PARTS,
                )
    else:
        at_output = target + group[:, None] * output_stride_head + columns[None, :]
        tl.store(at_output, round_to(acc, output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["table_stride", "num_decodes", "num_requests"])
def _prefill_kernel(
    query,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    query_start_loc,
    seq_lens,
    block_table,
    output,
    scale,
    table_stride,
    num_decodes,
    num_requests,
    query_stride_token,
    query_stride_head,
    output_stride_token,
    output_stride_head,
    stride_block,
    stride_token,
    stride_head,
    scale_stride_block,
    scale_stride_token,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (kv_head, tile): ROWS // GROUP query tokens of one request, GROUP heads each.

    Request r owns the tiles from query_start_loc[r] // tokens + r on (both counted from the first
    request that is no decode), which leaves room for each one's last, partial tile.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    # Causality makes the last tiles the longest: they go first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = tl.program_id(0)
    # The last request whose tiles begin no later; read side by side, as CUDA graphs have many requests without tokens.
    before = 0
    for skipped in range(0, num_requests - num_decodes, REQUESTS):
        others = num_decodes + skipped + tl.arange(0, REQUESTS)
        starts = tl.load(query_start_loc + others, mask=others < num_requests, other=0) - num_decodes
        begun = (starts // TOKENS + others - num_decodes <= tile) & (others < num_requests)
        before += tl.sum(begun.to(tl.int32), axis=0)
    low = num_decodes + before - 1
    request = low.to(tl.int64)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    first_token = (tile - (query_start - num_decodes) // TOKENS - (low - num_decodes)) * TOKENS
    if first_token >= query_len:
        return
    seq_len = tl.load(seq_lens + request)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    token = first_token + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    real = (rows < TOKENS * GROUP) & (token < query_len)
    inside = real[:, None] & (columns < HEAD_DIM)[None, :]
    flat = (query_start + token).to(tl.int64)
    at_query = query + (flat * query_stride_token + heads * query_stride_head)[:, None] + columns[None, :]
    q = tl.load(at_query, mask=inside, other=0.0)
    if SCALED and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # float8 keys become float16 in one instruction, bfloat16 in several
    first_position = seq_len - query_len + first_token
    query_position = seq_len - query_len + token
    end = tl.minimum(first_position + TOKENS, seq_len)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    table = block_table + request * table_stride

    # Keys that every row sees need no mask; with a window all are masked, as each is short.
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0)
    else:
        begin = tl.maximum(first_position + 1, 0) // KEYS * KEYS
        for start in tl.range(0, begin, KEYS, num_stages=STAGES):
            top, total, acc = _attend_tile(
                q,
                top,
                total,
                acc,
                start + tl.arange(0, KEYS),
                query_position,
                end,
                scale,
                table,
                k_cache,
                v_cache,
                k_scale,
                v_scale,
                kv_head,
                stride_block,
                stride_token,
                stride_head,
                scale_stride_block,
                scale_stride_token,
                BLOCK_SIZE,
                HEAD_DIM,
                PADDED,
                WINDOW,
                SCALED,
                False,
                False,
            )
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        top, total, acc = _attend_tile(
            q,
            top,
            total,
            acc,
            start + tl.arange(0, KEYS),
            query_position,
            end,
            scale,
            table,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            kv_head,
            stride_block,
            stride_token,
            stride_head,
            scale_stride_block,
            scale_stride_token,
            BLOCK_SIZE,
            HEAD_DIM,
            PADDED,
            WINDOW,
            SCALED,
            True,
            True,
        )
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = output + (flat * output_stride_token + heads * output_stride_head)[:, None] + columns[None, :]
    tl.store(target, round_to(acc, output.dtype.element_ty), mask=inside)


_launch_decode = Launcher(_decode_kernel)
_launch_decode_rows = Launcher(decode_rows_kernel)
_launch_prefill = Launcher(_prefill_kernel)


def paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """`atom.kernels.torch.attention.paged_attention`; query and output may be strided, caches alike."""
    num_requests = seq_lens.shape[0]
    _, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    padded_group = next_power_of_2(group)
    padded = max(16, next_power_of_2(head_dim))
    itemsize = query.element_size()
    scaled = k_scale is not None
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride(3) == query.stride(2) == output.stride(2) == block_table.stride(1) == 1
    strides = (
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        k_scale.stride(0) if k_scale is not None else 0,
        k_scale.stride(1) if k_scale is not None else 0,
    )
    scale *= _LOG2_E
    table_stride = block_table.stride(0)
    if num_decodes:
        num_keys = min(max_seq_len, sliding_window) if sliding_window else max_seq_len
        groups, multiprocessors = num_decodes * num_kv_heads, num_multiprocessors(query.device)
        fill, splits = num_splits(groups, num_keys, multiprocessors)
        merges = splits > 1 and group <= _MOST_MERGED_HEADS and has_few_groups(groups, multiprocessors)
        overlap = overlap_options(query.device)
        if splits > 1:
            parts = torch.empty((num_decodes, num_heads, splits, head_dim), dtype=torch.float32, device=query.device)
            parts_log = torch.empty((num_decodes, num_heads, splits), dtype=torch.float32, device=query.device)
        else:
            parts = parts_log = _no_parts(query.device)
        grid = num_kv_heads, num_decodes, splits
        pointers = (
            *(query, k_cache, v_cache, k_scale, v_scale, seq_lens, block_table),
            *(output, parts, parts_log, arrivals(query.device)),
        )
        numbers = scale, table_stride, fill, splits
        if scaled and _float8_has_kernel(query, k_cache, group):
            tile = DECODE_FLOAT8_TILE
            rows = -(-group // tile.rows) * tile.rows
            subtiles = tile.columns // (decode_float8.SUBTILE * tile.num_warps)
            in_words = [stride // 4 for stride in strides[4:7]]
            decode_float8.launch(
                grid,
                pointers,
                (*numbers, *strides[:4], in_words[0], in_words[2], *strides[7:]),
                (
                    *(group, rows, tile.num_warps, subtiles, in_words[1], block_size, head_dim, sliding_window),
                    *(LEAST_KEYS, LONG_KEYS, padded_group, parts_at_once(padded_group, padded, tile.num_warps), merges),
                ),
                num_warps=tile.num_warps,
                **overlap,
            )
        elif scaled and group <= MOST_HEADS:
            tile = decode_rows_tile(groups >= 8 * multiprocessors)
            at_once = parts_at_once(group, padded, tile.num_warps)
            _launch_decode_rows(
                grid,
                pointers,
                (*numbers, *strides),
                (group, tile.columns, block_size, head_dim, padded, sliding_window, tile.num_stages, at_once, merges),
                num_warps=tile.num_warps,
                **overlap,
            )
        else:
            whole_parts = group <= _MOST_WHOLE_PARTS_HEADS and has_few_groups(groups, multiprocessors)
            tile = decode_tile(padded, itemsize, k_cache.element_size(), whole_parts)
            rows = max(tile.rows, padded_group)
            sizes = group, rows, tile.columns, block_size, head_dim, padded, sliding_window, scaled, tile.num_stages
            _launch_decode(
                grid,
                pointers,
                (*numbers, *strides),
                (*sizes, padded_group, parts_at_once(padded_group, padded, tile.num_warps), merges),
                num_warps=tile.num_warps,
                **overlap,
            )
        if splits > 1 and not merges:
            merge(parts, parts_log, seq_lens, output, fill, tile.columns, padded, sliding_window, **overlap)
    if num_requests > num_decodes:
        # Queries that fill the chip run best in many small programs; a few need all the warps they can get.
        work = (query.shape[0] - num_decodes) * num_kv_heads * group
        fills_chip = work >= 256 * num_multiprocessors(query.device)
        tile = prefill_tile(padded, itemsize, fills_chip)
        rows, warps = tile.rows, tile.num_warps
        if max_query_len * group <= 16:  # a few drafted tokens, or the tail of a prompt
            rows, warps = 16, 4
        rows = max(rows, next_power_of_2(group))
        tokens = rows // group
        num_tiles = (query.shape[0] - num_decodes) // tokens + num_requests - num_decodes
        _launch_prefill(
            (num_kv_heads, num_tiles, 1),
            (query, k_cache, v_cache, k_scale, v_scale, query_start_loc, seq_lens, block_table, output),
            (scale, table_stride, num_decodes, num_requests, *strides),
            (
                group,
                rows,
                tile.columns,
                _REQUESTS,
                block_size,
                head_dim,
                padded,
                sliding_window,
                scaled,
                tile.num_stages,
            ),
            num_warps=warps,
        )


def _float8_has_kernel(query: torch.Tensor, cache: torch.Tensor, group: int) -> bool:
    """Whether `decode_float8` serves these shapes here."""
    return (
        CHIP == "hopper"
        and overlap_options(query.device)["OVERLAP"]
        and cache.dtype == torch.float8_e4m3fn
        and query.dtype != torch.float32
        and cache.shape[3] in decode_float8.HEAD_DIMS
        and cache.shape[1] % decode_float8.SUBTILE == 0
        and group <= decode_float8.MOST_HEADS
        and cache.stride(1) % 16 == 0
        and cache.stride(2) % 16 == 0
    )


@cache
def _no_parts(device: torch.device) -> torch.Tensor:
    """What is given, and never written to, where requests aren't split: the kernel is the same."""
    return torch.empty(4, dtype=torch.float32, device=device)


def num_splits(num_groups: int, num_keys: int, multiprocessors: int) -> tuple[int, int]:
    """(parts to cut a request's keys into so that programs fill the GPU, the most parts that any request gets).

    num_groups: requests x KV heads; num_keys: of the longest request that there may be.
    """
    programs = _PROGRAMS_OF_FEW if has_few_groups(num_groups, multiprocessors) else _PROGRAMS_PER_MULTIPROCESSOR
    fill = max(1, multiprocessors * programs // num_groups)
    most = max(fill, min(-(-num_keys // LONG_KEYS), _MOST_LONG_SPLITS), -(-num_keys // _MOST_KEYS))
    return fill, max(1, min(most, -(-num_keys // LEAST_KEYS), _MAX_SPLITS))


def has_few_groups(num_groups: int, multiprocessors: int) -> bool:
    """Whether requests x KV heads are so few that even the parts of all leave much of the GPU idle."""
    return num_groups <= min(multiprocessors // 4, MOST_COUNTERS)
