"""Choosing tokens from logits without sorting them.

One kernel looks at all chunks of all rows at once; a second one, one program a row, finds where the
row's filters cut and inverts the distribution function of what is left. A cut is searched by
measuring the row at several values at once (count and probability of the tokens not below each),
which narrows the range of values several times in each pass over the row.
"""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.launch import CHIP, next_power_of_2

_CHUNK = 4096
_SEARCH_BLOCK = 4096 if CHIP == "interpret" else 2048
_THRESHOLDS = 8


@triton.jit
def _scaled(logits, temperature):
    """logits / temperature, rounded as the reference does."""
    return tl.div_rn(logits, tl.broadcast_to(temperature, logits.shape))


@triton.jit
def _chunk_kernel(
    logits,
    temperature,
    tops,
    top_ids,
    sums,
    stride,
    vocab_size,
    CHUNK: tl.constexpr,
):
    """Of chunk c of row r: its largest logit (NaN if it holds one), the first id of that, sum of exp(scaled - top)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
    heat = tl.load(temperature + row)
    heat = tl.where(heat == 0.0, 1.0, heat)
    is_nan = x != x
    numbers = tl.where(is_nan, float("-inf"), x)
    top = tl.max(numbers, axis=0)
    top_id = tl.min(tl.where(numbers == top, ids, vocab_size - 1), axis=0)
    nan_id = tl.min(tl.where(is_nan, ids, vocab_size), axis=0)
    least = tl.where(top == float("-inf"), 0.0, top)
    scaled = _scaled(x, heat)
    # NaN and +inf make the sum NaN, which marks a row without a distribution.
    total = tl.sum(tl.exp(scaled - _scaled(tl.broadcast_to(least, x.shape), heat)), axis=0)
    at = row * tl.num_programs(1) + chunk
    tl.store(tops + at, tl.where(nan_id < vocab_size, float("nan"), top))
    tl.store(top_ids + at, tl.where(nan_id < vocab_size, nan_id, top_id))
    tl.store(sums + at, total)


@triton.jit
def _search(
    row_logits,
    vocab_size,
    heat,
    top,
    least,
    by_count,
    needed,
    count_all,
    mass_all,
    BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):
    """The largest value t such that the scaled logits in [t, inf), `least` or more, are enough.

    Enough: `needed` tokens if by_count, else a mass (sum of exp(scaled - top)) of `needed`.
    `count_all` and `mass_all` are those of all tokens not below `least`, or more. Returns a t that selects
    the same tokens as the largest does, the mass of those above the ones that t adds, and the value of
    the latter, if they are tied (else something below t or not above `least`).
    """
    low = least
    high = top + float("inf")
    count_low = count_all
    count_high = count_all * 0
    mass_low = mass_all
    mass_high = mass_all * 0.0
    bottom_seen = low
    top_seen = top
    step = tl.arange(0, THRESHOLDS)
    # The first look is wide near the top and coarse below: where cuts are is not known yet.
    thresholds = top - tl.exp2((THRESHOLDS - 2 - step).to(tl.float32))
    border = low
    searching = count_low > 1
    tries = 0
    while searching:
        counts = tl.zeros([THRESHOLDS, BLOCK], tl.int32)
        masses = tl.zeros([THRESHOLDS, BLOCK], tl.float32)
        smallest = tl.full([BLOCK], float("inf"), tl.float32)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = _scaled(tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")), heat)
            kept = (x >= least) & (x > float("-inf"))
            above = kept[None, :] & (x[None, :] >= thresholds[:, None])
            counts += above.to(tl.int32)
            masses += tl.where(above, tl.exp(x - top)[None, :], 0.0)
            between = kept & (x >= low) & (x < high)
            smallest = tl.minimum(smallest, tl.where(between, x, float("inf")))
            largest = tl.maximum(largest, tl.where(between, x, float("-inf")))
        bottom_seen = tl.min(smallest, axis=0)
        top_seen = tl.max(largest, axis=0)
        if bottom_seen >= top_seen:
            border = bottom_seen
            searching = False
        else:
            count = tl.sum(counts, axis=1)
            mass = tl.sum(masses, axis=1)
            if by_count:
                enough = count >= needed
            else:
                enough = mass >= needed
            low = tl.maximum(low, tl.max(tl.where(enough, thresholds, float("-inf")), axis=0))
            high = tl.minimum(high, tl.min(tl.where(enough, float("inf"), thresholds), axis=0))
            count_low = tl.minimum(count_low, tl.min(tl.where(enough, count, count_all), axis=0))
            mass_low = tl.minimum(mass_low, tl.min(tl.where(enough, mass, mass_all), axis=0))
            count_high = tl.maximum(count_high, tl.max(tl.where(enough, 0, count), axis=0))
            mass_high = tl.maximum(mass_high, tl.max(tl.where(enough, 0.0, mass), axis=0))
            tries += 1
            searching = (count_low - count_high > 1) & (tries < 128)
            if by_count:
                searching = searching & (count_low > needed)
            bottom = tl.maximum(low, bottom_seen)
            ceiling = tl.minimum(high, top_seen)
            thresholds = tl.minimum(bottom + (ceiling - bottom) * ((step + 1).to(tl.float32) / THRESHOLDS), ceiling)
    return low, mass_high, border


@triton.jit
def _sample_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    tops,
    top_ids,
    sums,
    tokens,
    stride,
    vocab_size,
    num_chunks,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):
    """Program r samples row r, with what _chunk_kernel found; CHUNKS = num_chunks padded to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < num_chunks
    at = row * num_chunks + chunks
    chunk_tops = tl.load(tops + at, mask=is_chunk, other=float("-inf"))
    chunk_ids = tl.load(top_ids + at, mask=is_chunk, other=vocab_size)
    masses = tl.load(sums + at, mask=is_chunk, other=0.0)
    heat = tl.load(temperature + row)

    # The first of the largest logits, or the first NaN.
    is_nan = chunk_tops != chunk_tops
    nan_id = tl.min(tl.where(is_nan, chunk_ids, vocab_size), axis=0)
    numbers = tl.where(is_nan, float("-inf"), chunk_tops)
    top = tl.max(numbers, axis=0)
    top_id = tl.min(tl.where(numbers == top, chunk_ids, vocab_size), axis=0)
    token = tl.where(nan_id < vocab_size, nan_id, top_id)

    is_random = heat != 0.0
    heat = tl.where(is_random, heat, 1.0)
    scaled_tops = _scaled(numbers, heat)
    top = tl.max(scaled_tops, axis=0)
    masses = tl.where(scaled_tops == float("-inf"), masses, masses * tl.exp(scaled_tops - top))
    mass = tl.sum(masses, axis=0)
    if is_random & (mass > 0.0) & (mass < float("inf")):
        row_logits = logits + row * stride
        # Kept: scaled logits not below least; of those that equal `border` only the first num_border.
        least = tl.full([], float("-inf"), tl.float32)
        border = tl.full([], float("inf"), tl.float32)
        num_border = vocab_size
        count = vocab_size
        filtered = False
        if HAS_MIN_P:
            floor = tl.load(min_p + row)
            if floor > 0.0:
                least = tl.minimum(top + tl.log(floor), top)
                filtered = True
        if HAS_TOP_K:
            k = tl.maximum(tl.load(top_k + row).to(tl.int32), 1)
            if k < vocab_size:
                kth, _, _ = _search(
                    row_logits,
                    vocab_size,
                    heat,
                    top,
                    tl.full([], float("-inf"), tl.float32),
                    True,
                    k,
                    count,
                    mass,
                    BLOCK,
                    THRESHOLDS,
                )
                least = tl.maximum(least, kth)
                filtered = True
        if HAS_TOP_P:
            p = tl.load(top_p + row)
            if p < 1.0:
                if filtered:
                    part = tl.zeros([BLOCK], tl.float32)
                    for start in range(0, vocab_size, BLOCK):
                        ids = start + tl.arange(0, BLOCK)
                        x = _scaled(tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")), heat)
                        part += tl.where(x >= least, tl.exp(x - top), 0.0)
                    mass = tl.sum(part, axis=0)
                enough = mass * p
                low, mass_high, found = _search(
                    row_logits, vocab_size, heat, top, least, False, enough, count, mass, BLOCK, THRESHOLDS
                )
                least = tl.maximum(least, low)
                if found >= least:
                    border = found
                    missing = tl.ceil((enough - mass_high) / tl.exp(border - top))
                    num_border = tl.maximum(tl.minimum(missing, vocab_size.to(tl.float32)), 1.0).to(tl.int32)
                filtered = True
        tied = tl.zeros([CHUNKS], tl.int32)
        if filtered:
            masses = tl.zeros([CHUNKS], tl.float32)
            for chunk in range(0, num_chunks):
                ids = chunk * CHUNK + tl.arange(0, CHUNK)
                x = _scaled(tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")), heat)
                kept = (x >= least) & (x != border)
                masses = tl.where(chunks == chunk, tl.sum(tl.where(kept, tl.exp(x - top), 0.0), axis=0), masses)
                tied = tl.where(chunks == chunk, tl.sum((x == border).to(tl.int32), axis=0), tied)
            kept_ties = tl.minimum(tl.maximum(num_border - (tl.cumsum(tied, axis=0) - tied), 0), tied)
            masses += kept_ties * tl.exp(tl.minimum(border - top, 0.0))

        # The chunk that holds the answer, then the token in it: the first whose cumulative mass exceeds the target.
        cumulative = tl.cumsum(masses.to(tl.float64), axis=0)
        target = tl.load(uniform + row).to(tl.float64) * tl.max(cumulative, axis=0)
        first = tl.min(tl.where((cumulative > target) & (masses > 0.0), chunks, CHUNKS), axis=0)
        last = tl.max(tl.where(masses > 0.0, chunks, -1), axis=0)
        chosen = tl.minimum(first, last)
        inside = tl.sum(tl.where(chunks == chosen, masses, 0.0), axis=0).to(tl.float64)
        before = tl.sum(tl.where(chunks == chosen, cumulative, 0.0), axis=0) - inside
        fraction = tl.maximum((target - before) / inside, 0.0).to(tl.float32)
        ties_before = tl.sum(tl.where(chunks < chosen, tied, 0), axis=0)

        ids = chosen * CHUNK + tl.arange(0, CHUNK)
        x = _scaled(tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")), heat)
        is_border = x == border
        rank = ties_before + tl.cumsum(is_border.to(tl.int32), axis=0)
        kept = (x >= least) & ((x != border) | (rank <= num_border))
        weights = tl.where(kept, tl.exp(x - top), 0.0)
        reached = tl.cumsum(weights, axis=0)
        # The chunk's sum is rounded differently here: go by the fraction of it.
        goal = fraction * tl.max(reached, axis=0)
        first_id = tl.min(tl.where((reached > goal) & (weights > 0.0), ids, vocab_size), axis=0)
        last_id = tl.max(tl.where(weights > 0.0, ids, 0), axis=0)
        token = tl.minimum(first_id, last_id)
    tl.store(tokens + row, token.to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """`atom.kernels.torch.sampling.sample`; nothing waits for the device."""
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    found = torch.empty((3, rows, num_chunks), dtype=torch.float32, device=logits.device)
    tops, sums, top_ids = found[0], found[1], found[2].view(torch.int32)
    _chunk_kernel[(rows, num_chunks)](
        logits, temperature, tops, top_ids, sums, logits.stride(0), vocab_size, _CHUNK, num_warps=8
    )
    _sample_kernel[(rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        tops,
        top_ids,
        sums,
        tokens,
        logits.stride(0),
        vocab_size,
        num_chunks,
        top_k is not None,
        top_p is not None,
        min_p is not None,
        _CHUNK,
        next_power_of_2(num_chunks),
        _SEARCH_BLOCK,
        _THRESHOLDS,
        num_warps=16 if CHIP == "hopper" else 8,
    )
    return tokens
