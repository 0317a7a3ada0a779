"""Decode attention over float8 caches on NVIDIA GPUs, written with the layouts of their matrix instruction.

A thread loads, 16 bytes at a time, just those keys and values that it multiplies: they are widened in registers and
never go through shared memory, whose bandwidth and conversions bound the portable kernels. Each warp has a softmax of
its own over some of the keys, and they meet at the end (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867).
The loads of a tile are on their way while the one before it is multiplied.

Keys are the rows of the first product and the columns of the second, so that query heads, which are few, are padded to
8 and not to 16. What a dimension is called within a product doesn't matter: it is permuted so that 16 bytes that lie
side by side belong to one thread. Not for the interpreter, nor for AMD GPUs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from atom.kernels.triton.launcher import Launcher

HEAD_DIMS = (64, 128)
MOST_HEADS = 16  # query heads a key head
SUBTILE = 16  # keys that share a block of the cache

_LIFT = gl.constexpr(6)  # exponent by which weights are raised: float16 holds them times small scales of values


@gluon.constexpr_function
def _bits(n, shape_rank, dim, first=1):
    """Bases of a linear layout: `first`, twice it, ... below n, along a dimension."""
    bases = []
    while first < n:
        bases.append([first if d == dim else 0 for d in range(shape_rank)])
        first *= 2
    return bases


@gluon.constexpr_function
def _key_layout(warps, subtiles, words):
    """[warps, subtiles, 16, words]: four threads a key, 16 bytes each, eight keys."""
    regs = _bits(4, 4, 3) + _bits(words, 4, 3, 16) + _bits(16, 4, 2, 8) + _bits(subtiles, 4, 1)
    lanes = _bits(16, 4, 3, 4) + _bits(8, 4, 2)
    return gl.DistributedLinearLayout(regs, lanes, _bits(warps, 4, 0), [], [warps, subtiles, 16, words])


@gluon.constexpr_function
def _value_layout(warps, subtiles, words):
    """[warps, subtiles, 16, words]: eight threads a key, keys in pairs."""
    regs = _bits(words // 8, 4, 3) + _bits(2, 4, 2) + _bits(16, 4, 2, 8) + _bits(subtiles, 4, 1)
    lanes = _bits(8, 4, 2, 2) + _bits(words, 4, 3, words // 8)
    return gl.DistributedLinearLayout(regs, lanes, _bits(warps, 4, 0), [], [warps, subtiles, 16, words])


@gluon.constexpr_function
def _scale_layout(warps, subtiles):
    """[warps, subtiles, 16]: where the products of keys are."""
    regs = _bits(16, 3, 2, 8) + _bits(subtiles, 3, 1)
    lanes = [[0, 0, 0], [0, 0, 0], *_bits(8, 3, 2)]
    return gl.DistributedLinearLayout(regs, lanes, _bits(warps, 3, 0), [], [warps, subtiles, 16])


@gluon.constexpr_function
def _along(dim, rank, layout):
    """Of indices along one dimension of a tensor."""
    for other in range(rank - 1, -1, -1):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _wait_for_inputs(OVERLAP: gl.constexpr):
    if OVERLAP:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _let_next_begin(OVERLAP: gl.constexpr):
    if OVERLAP:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _transpose_in_warp(x):
    """float16 [W, N, H] where a product left it -> the same where a product reads it; 8 x 8 at a time."""
    W: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    H: gl.constexpr = x.shape[2]
    y = gl.inline_asm_elementwise("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], gl.float16, True, 2)
    return y.reshape([W, N // 8, 8, H // 8, 8]).permute([0, 1, 4, 3, 2]).reshape([W, N, H])


@gluon.jit
def _widen_keys(raw):
    """Words of four e4m3 [W, U, 16, (j, c, s)] -> float16 [W, keys, (j, s, h, c, p)], h and p being within a word."""
    W: gl.constexpr = raw.shape[0]
    N: gl.constexpr = raw.shape[1] * 16
    D: gl.constexpr = raw.shape[3] * 4
    a, b, c, d = gl.inline_asm_elementwise(
        """{
        .reg .b16 lo, hi;
        .reg .b32 x, y;
        mov.b32 {lo, hi}, $4;
        cvt.rn.f16x2.e4m3x2 x, lo;
        cvt.rn.f16x2.e4m3x2 y, hi;
        mov.b32 {$0, $1}, x;
        mov.b32 {$2, $3}, y;
        }""",
        "=h,=h,=h,=h,r", [raw], (gl.float16, gl.float16, gl.float16, gl.float16), True, 1,
    )  # fmt: skip
    x = gl.join(gl.join(a, b), gl.join(c, d))  # [W, U, 16, (j, c, s), p, h]
    x = x.reshape([W, N, D // 64, 4, 4, 2, 2]).permute([0, 1, 2, 4, 6, 3, 5])
    return x.reshape([W, N, D])


@gluon.jit
def _widen_values(raw):
    """Words of four e4m3 [W, U, 16, (g, m)] -> float16 [W, (m, i, r, g), keys], i and r being within a word."""
    W: gl.constexpr = raw.shape[0]
    N: gl.constexpr = raw.shape[1] * 16
    D: gl.constexpr = raw.shape[3] * 4
    even, odd = gl.split(raw.reshape([W, N // 2, 2, D // 4]).permute([0, 1, 3, 2]))
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        """{
        .reg .b16 l0, h0, l1, h1;
        .reg .b32 t, u, x0, x1, x2, x3;
        prmt.b32 t, $8, $9, 0x5140;
        prmt.b32 u, $8, $9, 0x7362;
        mov.b32 {l0, h0}, t;
        mov.b32 {l1, h1}, u;
        cvt.rn.f16x2.e4m3x2 x0, l0;
        cvt.rn.f16x2.e4m3x2 x1, h0;
        cvt.rn.f16x2.e4m3x2 x2, l1;
        cvt.rn.f16x2.e4m3x2 x3, h1;
        mov.b32 {$0, $1}, x0;
        mov.b32 {$2, $3}, x1;
        mov.b32 {$4, $5}, x2;
        mov.b32 {$6, $7}, x3;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [even, odd],
        (gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), True, 1,
    )  # fmt: skip
    low = gl.join(gl.join(a, b), gl.join(c, d))
    high = gl.join(gl.join(e, f), gl.join(g, h))
    x = gl.join(low, high)  # [W, N / 2, (g, m), p, r, i]
    x = x.reshape([W, N // 2, 8, D // 32, 2, 2, 2]).permute([0, 3, 6, 5, 2, 1, 4])
    return x.reshape([W, D, N])


@gluon.jit
def _load_rows(
    cache, block, token, end, sub_start, stride_block, CLAMP: gl.constexpr, STRIDE_TOKEN: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, WORDS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[W, U, 16, WORDS] of a cache at the head; block, token, sub_start: see `_blocks`.

    CLAMP: rows at positions >= end are another row, so that nothing is read that was never written.
    """
    rows = gl.arange(0, 16, layout=_along(2, 4, LAYOUT))[None, None, :, None]
    columns = gl.arange(0, WORDS, layout=_along(3, 4, LAYOUT))[None, None, None, :]
    PAIR: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
    block = gl.convert_layout(block, PAIR)
    base = block.to(gl.int64) * stride_block
    if BLOCK_SIZE > 16:
        base += (gl.convert_layout(token, PAIR) * STRIDE_TOKEN).to(gl.int64)
    if CLAMP:
        last = end - 1 - gl.convert_layout(sub_start, PAIR)
        rows = gl.minimum(rows, last[:, :, None, None])
    offset = rows * STRIDE_TOKEN + columns
    return gl.load((cache + base)[:, :, None, None] + offset)


@gluon.jit
def _blocks(
    table, start, end, BLOCK_SIZE: gl.constexpr, WARPS: gl.constexpr, SUBTILES: gl.constexpr, LAYOUT: gl.constexpr
):
    """(cache block, first token in it, its position) of each 16 keys of a tile, [W, U] each; never past the end."""
    w = gl.arange(0, WARPS, layout=_along(0, 2, LAYOUT))[:, None]
    u = gl.arange(0, SUBTILES, layout=_along(1, 2, LAYOUT))[None, :]
    sub_start = gl.minimum(start + (w * SUBTILES + u) * 16, (end - 1) // 16 * 16)
    return gl.load(table + sub_start // BLOCK_SIZE), sub_start % BLOCK_SIZE, sub_start


@gluon.jit
def _load_scales(
    k_scale, v_scale, block, token, sub_start, end, scale_stride_block, scale_stride_token, BLOCK_SIZE: gl.constexpr,
    LAYOUT: gl.constexpr, KEY_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales of a tile's keys and values, [W, keys] each."""
    PAIR: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    W: gl.constexpr = block.shape[0]
    U: gl.constexpr = block.shape[1]
    last = end - 1 - gl.convert_layout(sub_start, PAIR)
    rows = gl.minimum(gl.arange(0, 16, layout=_along(2, 3, LAYOUT))[None, None, :], last[:, :, None])
    if BLOCK_SIZE > 16:
        rows += gl.convert_layout(token, PAIR)[:, :, None]
    base = gl.convert_layout(block, PAIR).to(gl.int64) * scale_stride_block
    at = base[:, :, None] + rows * scale_stride_token
    k = gl.convert_layout(gl.load(k_scale + at).reshape([W, U * 16]), KEY_LAYOUT)
    v = gl.convert_layout(gl.load(v_scale + at).reshape([W, U * 16]), KEY_LAYOUT)
    return k, v


@gluon.jit
def _arrives_last(counter, num_parts):
    """`decode_merge.arrives_last`"""
    gl.inline_asm_elementwise("bar.sync 0; // $0", "=r", [], gl.int32, False, 1)  # the barrier's name changed in Triton
    last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_parts - 1
    if last:
        gl.store(counter, 0)
    return last


@gluon.jit
def _merge_parts(
    parts, parts_log, first_row, num_splits, num_parts, output, output_stride_head, GROUP: gl.constexpr,
    PADDED_GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """`decode_merge.merge_parts`"""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 128 // HEAD_DIM, HEAD_DIM // 4], [WARPS, 1, 1], [2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    heads = gl.arange(0, PADDED_GROUP, layout=_along(0, 3, LAYOUT))
    part_of = gl.arange(0, PARTS, layout=_along(1, 3, LAYOUT))
    columns = gl.arange(0, HEAD_DIM, layout=_along(2, 3, LAYOUT))
    rows = gl.convert_layout(first_row + heads * num_splits, gl.SliceLayout(1, ROWS))
    here = gl.convert_layout(part_of, gl.SliceLayout(0, ROWS))
    real = gl.convert_layout(heads, gl.SliceLayout(1, ROWS)) < GROUP
    top = gl.full([PADDED_GROUP], float("-inf"), gl.float32, layout=gl.SliceLayout(1, ROWS))
    total = gl.zeros([PADDED_GROUP], gl.float32, layout=gl.SliceLayout(1, ROWS))
    acc = gl.zeros([PADDED_GROUP, HEAD_DIM], gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    for start in range(0, num_parts, PARTS):
        part = start + here
        at = rows[:, None] + part[None, :]
        wanted = real[:, None] & (part < num_parts)[None, :]
        logs = gl.load(parts_log + at, mask=wanted, other=float("-inf"), cache_modifier=".cg")
        source = parts + (at * HEAD_DIM)[:, :, None] + columns[None, None, :]
        inside = wanted[:, :, None] & (columns >= 0)[None, None, :]
        values = gl.load(source, mask=inside, other=0.0, cache_modifier=".cg")
        new_top = gl.maximum(top, gl.max(logs, axis=1))
        reference = gl.where(new_top == float("-inf"), 0.0, new_top)
        weights = gl.exp2(logs - reference[:, None])
        fade = gl.exp2(top - reference)
        total = total * fade + gl.sum(weights, axis=1)
        fade_here = gl.convert_layout(fade, gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT)))
        acc = acc * fade_here[:, None] + gl.sum(values * weights[:, :, None], axis=1)
        top = new_top
    total = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT)))
    acc = acc / total[:, None]
    head = gl.arange(0, PADDED_GROUP, layout=gl.SliceLayout(1, gl.SliceLayout(1, LAYOUT)))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    target = output + head[:, None] * output_stride_head + column[None, :]
    exists = (head < GROUP)[:, None] & (column >= 0)[None, :]
    gl.store(target, acc.to(output.dtype.element_ty), mask=exists)


@gluon.jit(do_not_specialize=["table_stride", "fill", "num_splits"])
def decode_float8_kernel(
    query, k_cache, v_cache, k_scale, v_scale, seq_lens, block_table, output, parts, parts_log,
    counters, scale, table_stride, fill, num_splits, query_stride_token, query_stride_head, output_stride_token,
    output_stride_head, stride_block, stride_head, scale_stride_block, scale_stride_token,
    GROUP: gl.constexpr, HEADS: gl.constexpr, WARPS: gl.constexpr, SUBTILES: gl.constexpr, STRIDE_TOKEN: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, WINDOW: gl.constexpr, LEAST: gl.constexpr, LONG: gl.constexpr,
    PADDED_GROUP: gl.constexpr, PARTS: gl.constexpr, MERGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As `attention._decode_kernel`: program (kv_head, request, split); WARPS * SUBTILES * 16 keys a tile.

    The caches' strides are in words of four numbers.

    HEADS: GROUP rounded up to a multiple of 8. BLOCK_SIZE: a multiple of 16.
    """
    KEYS: gl.constexpr = SUBTILES * 16
    TILE: gl.constexpr = WARPS * KEYS
    WORDS: gl.constexpr = HEAD_DIM // 4
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    K_LAYOUT: gl.constexpr = _key_layout(WARPS, SUBTILES, WORDS)
    V_LAYOUT: gl.constexpr = _value_layout(WARPS, SUBTILES, WORDS)
    S_LAYOUT: gl.constexpr = _scale_layout(WARPS, SUBTILES)
    PAIRS: gl.constexpr = gl.SliceLayout(2, S_LAYOUT)
    KEYS_LAYOUT: gl.constexpr = gl.SliceLayout(2, MMA)

    _let_next_begin(OVERLAP)
    kv_head = gl.program_id(0)
    request = gl.program_id(1).to(gl.int64)
    split = gl.program_id(2)
    seq_len = gl.load(seq_lens + request)
    first = seq_len * 0
    if WINDOW > 0:
        first = gl.maximum(seq_len - WINDOW, 0)
    num_keys = seq_len - first
    most_parts = gl.minimum(gl.maximum(fill, gl.cdiv(num_keys, LONG)), num_splits)
    length = gl.cdiv(gl.maximum(gl.cdiv(num_keys, most_parts), LEAST), TILE) * TILE  # as `decode_split.split_length`
    begin = first + split * length
    end = gl.minimum(begin + length, seq_len)
    _wait_for_inputs(OVERLAP)
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // HEAD_DIM, HEAD_DIM // 4], [WARPS, 1], [1, 0])
    head = kv_head * GROUP + gl.arange(0, HEADS, layout=gl.SliceLayout(1, OUT))
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))[None, :]
    real = head < kv_head * GROUP + GROUP
    target = output + request * output_stride_token + head[:, None] * output_stride_head + columns
    if begin >= end:
        if split == 0:  # no keys at all
            nothing = gl.zeros([HEADS, HEAD_DIM], output.dtype.element_ty, layout=OUT)
            gl.store(target, nothing, mask=real[:, None])
        return

    # The dimension that the product calls k is p + 2h + 4s + 16c + 64j, for k = p + 2c + 8h + 16s + 64j.
    k = gl.arange(0, HEAD_DIM, layout=_along(1, 3, RIGHT))
    at = (k & 1) + ((k >> 3) & 1) * 2 + ((k >> 4) & 3) * 4 + ((k >> 1) & 3) * 16 + (k >> 6) * 64
    heads = gl.arange(0, HEADS, layout=_along(2, 3, RIGHT))
    zero = gl.arange(0, WARPS, layout=_along(0, 3, RIGHT)) * 0
    at_query = query + request * query_stride_token + kv_head * GROUP * query_stride_head
    offsets = zero[:, None, None] + at[None, :, None] + heads[None, None, :] * query_stride_head
    exists = (heads < GROUP)[None, None, :] & (offsets >= 0)
    q = gl.load(at_query + offsets, mask=exists, other=0.0).to(gl.float16)

    k_cache = k_cache.to(gl.pointer_type(gl.int32), bitcast=True) + kv_head * stride_head
    v_cache = v_cache.to(gl.pointer_type(gl.int32), bitcast=True) + kv_head * stride_head
    k_scale += kv_head
    v_scale += kv_head
    table = block_table + request * table_stride
    start = begin
    if WINDOW > 0:
        start = begin // 16 * 16
    block, token, sub_start = _blocks(table, start, end, BLOCK_SIZE, WARPS, SUBTILES, PAIRS)
    raw_k = _load_rows(
        k_cache, block, token, end, sub_start, stride_block, False, STRIDE_TOKEN, BLOCK_SIZE, WORDS, K_LAYOUT
    )
    k_gain, v_gain = _load_scales(
        k_scale, v_scale, block, token, sub_start, end, scale_stride_block, scale_stride_token, BLOCK_SIZE, S_LAYOUT,
        KEYS_LAYOUT,
    )  # fmt: skip
    raw_v = _load_rows(
        v_cache, block, token, end, sub_start, stride_block, True, STRIDE_TOKEN, BLOCK_SIZE, WORDS, V_LAYOUT
    )
    block, token, sub_start = _blocks(table, start + TILE, end, BLOCK_SIZE, WARPS, SUBTILES, PAIRS)

    top = gl.full([WARPS, HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, MMA))
    total = gl.zeros([WARPS, KEYS, HEADS], gl.float32, layout=MMA)
    acc = gl.zeros([WARPS, HEAD_DIM, HEADS], gl.float32, layout=MMA)
    in_tile = (
        gl.arange(0, WARPS, layout=_along(0, 2, KEYS_LAYOUT))[:, None] * KEYS
        + gl.arange(0, KEYS, layout=_along(1, 2, KEYS_LAYOUT))[None, :]
    )
    for tile in range(start, end, TILE):
        keys = gl.convert_layout(_widen_keys(raw_k), LEFT)
        scores = mma_v2(keys, q, gl.zeros([WARPS, KEYS, HEADS], gl.float32, layout=MMA))
        raw_k = _load_rows(
            k_cache, block, token, end, sub_start, stride_block, False, STRIDE_TOKEN, BLOCK_SIZE, WORDS, K_LAYOUT
        )
        next_block, next_token, next_start = _blocks(table, tile + 2 * TILE, end, BLOCK_SIZE, WARPS, SUBTILES, PAIRS)
        inside = tile + in_tile < end
        if WINDOW > 0:
            inside = inside & (tile + in_tile >= begin)
        scores = gl.where(inside[:, :, None], scores * (k_gain * scale)[:, :, None], float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, axis=1))
        # Keys of another warp may be all that there are.
        reference = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(scores - (reference - _LIFT)[:, None, :])
        fade = gl.exp2(top - reference)[:, None, :]
        total = total * fade + p
        weights = _transpose_in_warp((p * v_gain[:, :, None]).to(gl.float16))
        weights = gl.convert_layout(weights, RIGHT)
        k_gain, v_gain = _load_scales(
            k_scale, v_scale, block, token, sub_start, end, scale_stride_block, scale_stride_token, BLOCK_SIZE,
            S_LAYOUT, KEYS_LAYOUT,
        )  # fmt: skip
        values = gl.convert_layout(_widen_values(raw_v), LEFT)
        acc = mma_v2(values, weights, acc * fade)
        raw_v = _load_rows(
            v_cache, block, token, end, sub_start, stride_block, True, STRIDE_TOKEN, BLOCK_SIZE, WORDS, V_LAYOUT
        )
        block, token, sub_start = next_block, next_token, next_start
        top = new_top

    highest = gl.max(top, axis=0)  # every program has a key
    weight = gl.exp2(top - highest[None, :])
    whole = gl.sum(gl.sum(total, axis=1) * weight, axis=0)  # of HEADS
    result = gl.sum(acc * weight[:, None, :], axis=0)
    whole_here = gl.convert_layout(whole, gl.SliceLayout(0, result.type.layout))
    result = result / whole_here[None, :]
    result = result.reshape([HEAD_DIM // 16, 2, 8, HEADS]).permute([3, 2, 0, 1]).reshape([HEADS, HEAD_DIM])
    result = gl.convert_layout(result, OUT)
    row = (request * gl.num_programs(0) * GROUP + head) * num_splits + split
    if length < num_keys:
        logs = gl.convert_layout(highest + gl.log2(whole) - _LIFT, gl.SliceLayout(1, OUT))
        gl.store(parts_log + row, logs, mask=real)
        gl.store(parts + row[:, None] * HEAD_DIM + columns, result, mask=real[:, None])
        if MERGES:
            place = request * gl.num_programs(0) + kv_head
            num_parts = gl.cdiv(num_keys, length)
            if _arrives_last(counters + place, num_parts):
                first_row = place * GROUP * num_splits
                first_target = output + request * output_stride_token + kv_head * GROUP * output_stride_head
                _merge_parts(
                    parts, parts_log, first_row, num_splits, num_parts, first_target, output_stride_head, GROUP,
                    PADDED_GROUP, HEAD_DIM, PARTS, WARPS,
                )  # fmt: skip
    else:
        gl.store(target, result.to(output.dtype.element_ty), mask=real[:, None])


launch = Launcher(decode_float8_kernel)
