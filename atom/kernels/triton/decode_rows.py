"""Decode attention without tensor cores, for float8 caches and few query heads a key head.

Each row of a tile of keys keeps a softmax of its own (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867),
and the rows meet once, at the end: float8 keys and values go from memory to registers, where they are widened and
used, and never through shared memory, whose bandwidth bounds the tensor-core kernel.
"""

import triton
import triton.language as tl

from atom.kernels.triton.decode_merge import arrives_last, merge_parts
from atom.kernels.triton.decode_split import first_key, split_length
from atom.kernels.triton.numerics import round_to
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs

MOST_HEADS = 2  # query heads a key head


@triton.jit
def _step(q, top, total, acc, k, v, k_gain, v_gain, inside):
    """One tile for one query head: q [PADDED] times the scale and log2(e); a softmax for each key row."""
    scores = tl.where(inside, tl.sum(k * q[None, :], axis=1) * k_gain, float("-inf"))
    new_top = tl.maximum(top, scores)
    # A row that has seen nothing yet must not subtract infinities.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - reference)
    fade = tl.exp2(top - reference)
    acc = acc * fade[:, None] + v * (p * v_gain)[:, None]
    return new_top, total * fade + p, acc


@triton.jit
def _store(
    top,
    total,
    acc,
    output,
    parts,
    parts_log,
    row,
    columns,
    is_part,
    HEAD_DIM: tl.constexpr,
):
    """Merge the rows' softmaxes; `output` is the head's row, `row` its place among the parts."""
    highest = tl.max(top, axis=0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(total * weight, axis=0)
    result = tl.sum(acc * weight[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    exists = columns < HEAD_DIM
    if is_part:
        tl.store(parts_log + row, highest + tl.log2(whole))
        tl.store(parts + row * HEAD_DIM + columns, result, mask=exists)
    else:
        tl.store(output + columns, round_to(result, output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["table_stride", "fill", "num_splits"])
def decode_rows_kernel(
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
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    MERGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """As `_decode_kernel`: program (kv_head, request, split). GROUP is 1 or 2."""
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
    columns = tl.arange(0, PADDED)
    exists = columns < HEAD_DIM
    table = block_table + request * table_stride
    at_query = query + request * query_stride_token + kv_head * GROUP * query_stride_head + columns
    q0 = tl.load(at_query, mask=exists, other=0.0).to(tl.float32) * scale
    top0 = tl.full([KEYS], float("-inf"), tl.float32)
    total0 = tl.zeros([KEYS], tl.float32)
    acc0 = tl.zeros([KEYS, PADDED], tl.float32)
    if GROUP > 1:
        q1 = tl.load(at_query + query_stride_head, mask=exists, other=0.0).to(tl.float32) * scale
        top1 = top0
        total1 = total0
        acc1 = acc0
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        keys_at = start + tl.arange(0, KEYS)
        inside = keys_at < end
        block = tl.load(table + keys_at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        token = keys_at % BLOCK_SIZE
        address = (block * stride_block + token * stride_token + kv_head * stride_head)[:, None] + columns[None, :]
        wanted = inside[:, None] & exists[None, :]
        raw_k = tl.load(k_cache + address, mask=wanted, other=0.0)
        raw_v = tl.load(v_cache + address, mask=wanted, other=0.0)
        if k_scale is not None:
            at_scale = block * scale_stride_block + token * scale_stride_token + kv_head
            k_gain = tl.load(k_scale + at_scale, mask=inside, other=0.0)
            v_gain = tl.load(v_scale + at_scale, mask=inside, other=0.0)
        else:
            k_gain = 1.0
            v_gain = 1.0
        k = raw_k.to(tl.float32)
        v = raw_v.to(tl.float32)
        top0, total0, acc0 = _step(q0, top0, total0, acc0, k, v, k_gain, v_gain, inside)
        if GROUP > 1:
            top1, total1, acc1 = _step(q1, top1, total1, acc1, k, v, k_gain, v_gain, inside)
    place = request * tl.num_programs(0) + kv_head
    first_output = output + request * output_stride_token + kv_head * GROUP * output_stride_head
    target = first_output
    first_row = place * GROUP * num_splits
    row = first_row + split
    is_part = length < seq_len - first
    _store(top0, total0, acc0, target, parts, parts_log, row, columns, is_part, HEAD_DIM)
    if GROUP > 1:
        target += output_stride_head
        row += num_splits
        _store(top1, total1, acc1, target, parts, parts_log, row, columns, is_part, HEAD_DIM)
    if MERGES and is_part:
        num_parts = tl.cdiv(seq_len - first, length)
        if arrives_last(counters + place, num_parts):
            merge_parts(
                parts,
                parts_log,
                first_row,
                num_splits,
                num_parts,
                first_output,
                output_stride_head,
                GROUP,
                GROUP,
                HEAD_DIM,
                PADDED,
                PARTS,
            )
