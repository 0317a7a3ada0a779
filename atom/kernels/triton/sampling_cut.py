"""Where the filters of a row of logits cut it, found without sorting.

A cut is the largest value such that the tokens not below it are enough: top_k of them, or a share top_p of the
probability. Programs measure parts of a row at several values at once (how many tokens are not below each, and their
mass, the sum of exp(scaled - top)); adding up the parts narrows the range of values that the cut lies in to one of
the intervals. A few such passes leave few tokens in doubt, which `search` looks at alone.

A row that has both filters narrows both ranges at once, with half of the values each: bounds of the mass that top_k
leaves are bounds of the mass that top_p wants. A row's parts are added in a fixed order: other rows don't matter.
"""

import triton
import triton.language as tl

from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs


@triton.jit
def scaled(logits, temperature):
    """logits / temperature, rounded as the reference does."""
    return tl.div_rn(logits, tl.broadcast_to(temperature, logits.shape))


@triton.jit
def row_facts(temperature, tops, bottoms, sums, row, num_parts, PARTS: tl.constexpr):
    """(whether a token is drawn, temperature, largest and smallest scaled logit, mass, mass of each part [PARTS]).

    The smallest is the finite one, but one whose probability isn't 0.
    """
    parts = tl.arange(0, PARTS)
    at = row * num_parts + parts
    part_tops = tl.load(tops + at, mask=parts < num_parts, other=float("-inf"))
    part_bottoms = tl.load(bottoms + at, mask=parts < num_parts, other=float("inf"))
    masses = tl.load(sums + at, mask=parts < num_parts, other=0.0)
    heat = tl.load(temperature + row)
    is_random = heat != 0.0
    heat = tl.where(is_random, heat, 1.0)
    scaled_tops = scaled(tl.where(part_tops != part_tops, float("-inf"), part_tops), heat)
    top = tl.max(scaled_tops, axis=0)
    masses = tl.where(scaled_tops == float("-inf"), masses, masses * tl.exp(scaled_tops - top))
    mass = tl.sum(masses, axis=0)
    bottom = tl.maximum(tl.min(scaled(part_bottoms, heat), axis=0), top - 104.0)
    return is_random & (mass > 0.0) & (mass < float("inf")), heat, top, bottom, mass, masses


@triton.jit
def row_filters(
    top_k,
    top_p,
    min_p,
    row,
    vocab_size,
    top,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):
    """(k, p, least scaled logit of min_p, any filter is on, and how many of the thresholds are for the cut of k)."""
    k = tl.full([], 0, tl.int32) + vocab_size
    p = tl.full([], 1.0, tl.float32)
    least = tl.full([], float("-inf"), tl.float32)
    if HAS_TOP_K:
        k = tl.maximum(tl.load(top_k + row).to(tl.int32), 1)
    if HAS_TOP_P:
        p = tl.maximum(tl.load(top_p + row), 1e-20)  # one token at least
    if HAS_MIN_P:
        floor = tl.load(min_p + row)
        least = tl.where(floor > 0.0, tl.minimum(top + tl.log(floor), top), least)
    by_count = k < vocab_size
    by_mass = p < 1.0
    has_floor = least > float("-inf")
    # Where top_p follows another filter, the mass that the other leaves is measured too.
    both = tl.where(by_count | has_floor, THRESHOLDS // 2, 0)
    num_k = tl.where(by_mass, both, tl.where(by_count, THRESHOLDS, 0))
    return k, p, least, by_count | by_mass | has_floor, num_k


@triton.jit
def _pick(values, index, SIZE: tl.constexpr):
    """values[index] of [SIZE]."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, values, 0), axis=0)


@triton.jit
def pick_column(values, index, COLUMNS: tl.constexpr):
    """values[:, index] of [..., COLUMNS]."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == index, values, 0), axis=1)


@triton.jit
def ranges(
    thresholds,
    counts,
    masses,
    row,
    num_parts,
    k,
    p,
    num_k,
    mass_all,
    THRESHOLDS: tl.constexpr,
    PARTS: tl.constexpr,
    COUNTED: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """What the last pass says about the row: thresholds, counts and masses [THRESHOLDS], and the counts of each part.

    Then the indices of the thresholds between which the cuts lie: low and high of k, low and high of p, and the
    masses of the first two. The tokens not below `low` are enough, those not below `high` aren't. A range without
    tokens (low is high) says that the filter is off, or cuts nothing.
    """
    step = tl.arange(0, THRESHOLDS)
    parts = tl.arange(0, PARTS)
    values = tl.load(thresholds + row * THRESHOLDS + step)
    at = (row * num_parts + parts)[:, None] * THRESHOLDS + step[None, :]
    part_counts = tl.zeros([PARTS, THRESHOLDS], tl.int32)
    if COUNTED:
        part_counts = tl.load(counts + at, mask=(parts < num_parts)[:, None], other=0)
    count = tl.sum(part_counts, axis=0)
    mass = tl.zeros([THRESHOLDS], tl.float32)
    if WEIGHED:
        mass = tl.sum(tl.load(masses + at, mask=(parts < num_parts)[:, None], other=0.0), axis=0)
    enough = tl.sum(((step < num_k) & (count >= k)).to(tl.int32), axis=0)
    low_k = tl.maximum(enough - 1, 0)
    high_k = enough
    mass_low_k = tl.where(num_k == 0, mass_all, _pick(mass, low_k, THRESHOLDS))
    mass_high_k = tl.where(num_k == 0, mass_all, _pick(mass, high_k, THRESHOLDS))
    # The mass that top_k leaves is between these two.
    surely = tl.sum(((step >= num_k) & (mass >= mass_low_k * p)).to(tl.int32), axis=0)
    perhaps = tl.sum(((step >= num_k) & (mass >= mass_high_k * p)).to(tl.int32), axis=0)
    low_p = tl.where(num_k == THRESHOLDS, high_k, num_k + tl.maximum(surely - 1, 0))
    high_p = tl.where(num_k == THRESHOLDS, high_k, tl.minimum(num_k + perhaps, THRESHOLDS - 1))
    return values, count, mass, part_counts, low_k, high_k, low_p, high_p, mass_low_k, mass_high_k


@triton.jit
def _first_thresholds(top, least, mass, vocab_size, p, num_k, THRESHOLDS: tl.constexpr):
    """For a row of which only its largest logit and its mass are known: `least` first, `top` and inf last."""
    step = tl.arange(0, THRESHOLDS)
    for_k = step < num_k
    index = tl.where(for_k, step, step - num_k)
    size = tl.where(for_k, num_k, THRESHOLDS - num_k)
    fraction = (index - 1).to(tl.float32) / (size - 3).to(tl.float32)
    log_size = tl.log(tl.full([], 0.0, tl.float32) + vocab_size)
    # How far the top is above the mean token, in the sense of mass: the scale of the row.
    scale = tl.maximum(log_size - tl.log(mass), 1e-6)
    below_k = scale * tl.exp2(2.0 - 8.0 * fraction)
    # All tokens below the cut of p have a mass of (1 - p) of what is kept, and fewer than all would need larger ones.
    depth = tl.where(num_k == 0, scale, log_size) - tl.log(1.0 - p)
    below_p = depth * (1.0 - fraction)
    values = tl.maximum(top - tl.where(for_k, below_k, below_p), least)
    values = tl.where(index == size - 2, top, tl.minimum(values, top))
    return tl.where(index == 0, least, tl.where(index == size - 1, float("inf"), values))


@triton.jit
def _next_thresholds(low_k, high_k, low_p, high_p, top, num_k, THRESHOLDS: tl.constexpr):
    """Evenly in each range, its ends among them."""
    step = tl.arange(0, THRESHOLDS)
    for_k = step < num_k
    index = tl.where(for_k, step, step - num_k)
    size = tl.where(for_k, num_k, THRESHOLDS - num_k)
    low = tl.where(for_k, low_k, low_p)
    high = tl.where(for_k, high_k, high_p)
    ceiling = tl.minimum(high, top)
    fraction = index.to(tl.float32) / (size - 2).to(tl.float32)
    values = tl.minimum(low + (ceiling - low) * fraction, ceiling)
    return tl.where(index == size - 1, high, values)


@triton.jit(do_not_specialize=["num_parts", "parts_a_program"])
def narrow_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    tops,
    bottoms,
    sums,
    last_thresholds,
    last_counts,
    last_masses,
    thresholds,
    counts,
    masses,
    stride,
    vocab_size,
    num_parts,
    parts_a_program,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One pass: program (r, i) measures a few parts of row r at thresholds that follow from the last pass.

    thresholds: float32 [R, THRESHOLDS]; counts int32 and masses float32 [R, num_parts, THRESHOLDS].
    """
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * parts_a_program
    wait_for_inputs(OVERLAP)
    is_drawn, heat, top, bottom, mass, _part_masses = row_facts(temperature, tops, bottoms, sums, row, num_parts, PARTS)
    k, p, least, _is_filtered, num_k = row_filters(
        top_k, top_p, min_p, row, vocab_size, top, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P, THRESHOLDS
    )
    if is_drawn & ((num_k > 0) | (p < 1.0)):
        if FIRST:
            values = _first_thresholds(top, tl.maximum(least, bottom), mass, vocab_size, p, num_k, THRESHOLDS)
        else:
            last, _, _, _, low_k, high_k, low_p, high_p, _, _ = ranges(
                last_thresholds,
                last_counts,
                last_masses,
                row,
                num_parts,
                k,
                p,
                num_k,
                mass,
                THRESHOLDS,
                PARTS,
                HAS_TOP_K,
                HAS_TOP_P,
            )
            values = _next_thresholds(
                _pick(last, low_k, THRESHOLDS),
                _pick(last, high_k, THRESHOLDS),
                _pick(last, low_p, THRESHOLDS),
                _pick(last, high_p, THRESHOLDS),
                top,
                num_k,
                THRESHOLDS,
            )
        step = tl.arange(0, THRESHOLDS)
        if first == 0:
            tl.store(thresholds + row * THRESHOLDS + step, values)
        for part in range(first, tl.minimum(first + parts_a_program, num_parts)):
            above_count = tl.zeros([THRESHOLDS, BLOCK], tl.int32)
            above_mass = tl.zeros([THRESHOLDS, BLOCK], tl.float32)
            for start in range(0, PART, BLOCK):
                ids = part * PART + start + tl.arange(0, BLOCK)
                x = tl.load(logits + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
                x = scaled(x, heat)
                above = x[None, :] >= values[:, None]
                if COUNT:
                    above_count += above.to(tl.int32)
                if HAS_TOP_P:
                    above_mass += tl.where(above, tl.exp(x - top)[None, :], 0.0)
            at = (row * num_parts + part) * THRESHOLDS + step
            if COUNT:
                tl.store(counts + at, tl.sum(above_count, axis=1))
            if HAS_TOP_P:
                tl.store(masses + at, tl.sum(above_mass, axis=1))


@triton.jit(do_not_specialize=["num_parts", "parts_a_program", "capacity"])
def collect_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    tops,
    bottoms,
    sums,
    thresholds,
    counts,
    masses,
    candidates,
    lengths,
    in_range,
    kept,
    smallest,
    largest,
    bounds,
    bound_counts,
    stride,
    vocab_size,
    num_parts,
    parts_a_program,
    capacity,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    NARROWED: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """After the last pass: copies the tokens in doubt of each row, and sums up those that are kept for certain.

    In doubt are those between the ends of a range. candidates: float32 [R, capacity], their logits in order of ids, if
    there is room. Of each part, [R, num_parts]: lengths int32, its candidates; in_range int32, those in the range of
    the row's last cut; smallest and largest, the scaled logits of these; kept, the mass above that range. Of each row:
    bounds float32 [R, 8] (low and high of k and of p, then the masses at the first, second and fourth), and
    bound_counts int32 [R, 4] (tokens not below the first four).
    """
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * parts_a_program
    parts = tl.arange(0, PARTS)
    wait_for_inputs(OVERLAP)
    is_drawn, heat, top, bottom, mass, _part_masses = row_facts(temperature, tops, bottoms, sums, row, num_parts, PARTS)
    k, p, least, is_filtered, num_k = row_filters(
        top_k, top_p, min_p, row, vocab_size, top, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P, THRESHOLDS
    )
    if is_drawn & is_filtered:
        low_k = tl.maximum(least, bottom)
        high_k = low_k
        low_p = low_k
        high_p = low_k
        num_candidates = tl.zeros([PARTS], tl.int32)
        num_in_range = tl.zeros([PARTS], tl.int32)
        if NARROWED:
            is_cut = (num_k > 0) | (p < 1.0)
            if is_cut:
                values, count, weight, part_counts, i_low_k, i_high_k, i_low_p, i_high_p, mass_low_k, mass_high_k = (
                    ranges(
                        thresholds,
                        counts,
                        masses,
                        row,
                        num_parts,
                        k,
                        p,
                        num_k,
                        mass,
                        THRESHOLDS,
                        PARTS,
                        True,
                        HAS_TOP_P,
                    )
                )
                low_k = _pick(values, i_low_k, THRESHOLDS)
                high_k = _pick(values, i_high_k, THRESHOLDS)
                low_p = _pick(values, i_low_p, THRESHOLDS)
                high_p = _pick(values, i_high_p, THRESHOLDS)
                n_low_k = pick_column(part_counts, i_low_k, THRESHOLDS)
                n_high_k = pick_column(part_counts, i_high_k, THRESHOLDS)
                n_low_p = pick_column(part_counts, i_low_p, THRESHOLDS)
                n_high_p = pick_column(part_counts, i_high_p, THRESHOLDS)
                # Those in both ranges are candidates once. (At the larger of two values: the smaller of the counts.)
                n_beyond = tl.minimum(n_low_p, n_high_k)
                num_candidates = n_low_k - n_high_k + n_beyond - tl.minimum(n_beyond, n_high_p)
                if p < 1.0:
                    num_in_range = tl.maximum(tl.minimum(n_low_p, n_low_k) - n_high_p, 0)
                else:
                    num_in_range = num_candidates
                if first == 0:
                    tl.store(bounds + row * 8 + 4, mass_low_k)
                    tl.store(bounds + row * 8 + 5, mass_high_k)
                    tl.store(bounds + row * 8 + 6, _pick(weight, i_high_p, THRESHOLDS))
                    tl.store(bound_counts + row * 4, _pick(count, i_low_k, THRESHOLDS))
                    tl.store(bound_counts + row * 4 + 1, _pick(count, i_high_k, THRESHOLDS))
                    tl.store(bound_counts + row * 4 + 2, _pick(count, i_low_p, THRESHOLDS))
                    tl.store(bound_counts + row * 4 + 3, _pick(count, i_high_p, THRESHOLDS))
        if first == 0:
            tl.store(bounds + row * 8, low_k)
            tl.store(bounds + row * 8 + 1, high_k)
            tl.store(bounds + row * 8 + 2, low_p)
            tl.store(bounds + row * 8 + 3, high_p)
            at = row * num_parts + parts
            tl.store(lengths + at, num_candidates, mask=parts < num_parts)
            tl.store(in_range + at, num_in_range, mask=parts < num_parts)
        fits = tl.sum(num_candidates, axis=0) <= capacity
        low = tl.where(p < 1.0, tl.maximum(low_p, low_k), low_k)
        high = tl.where(p < 1.0, high_p, high_k)
        for part in range(first, tl.minimum(first + parts_a_program, num_parts)):
            ids = part * PART + tl.arange(0, PART)
            logit = tl.load(logits + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
            x = scaled(logit, heat)
            inside = (x >= low) & (x < high)
            tl.store(kept + row * num_parts + part, tl.sum(tl.where(x >= high, tl.exp(x - top), 0.0), axis=0))
            if NARROWED:
                tl.store(smallest + row * num_parts + part, tl.min(tl.where(inside, x, float("inf")), axis=0))
                tl.store(largest + row * num_parts + part, tl.max(tl.where(inside, x, float("-inf")), axis=0))
                # Most parts have none in doubt: a cumulative sum takes longer than the rest.
                if fits & (_pick(num_candidates, part, PARTS) > 0):
                    start = tl.sum(tl.where(parts < part, num_candidates, 0), axis=0)
                    in_doubt = ((x >= low_k) & (x < high_k)) | ((x >= high_k) & (x >= low_p) & (x < high_p))
                    place = start + tl.cumsum(in_doubt.to(tl.int32), axis=0) - 1
                    tl.store(candidates + row * capacity + place, logit, mask=in_doubt)


@triton.jit
def search(
    source,
    size,
    heat,
    top,
    low,
    high,
    by_count,
    needed,
    count_low,
    count_high,
    mass_low,
    mass_high,
    BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):
    """The largest t in [low, high) such that the scaled logits not below t are enough: `needed` tokens, or that mass.

    source: `size` logits, all those in the range and perhaps others; the counts and masses are those of all tokens
    not below `low`, or more, and not below `high`. Returns a t that selects the same tokens as the largest does,
    their mass, the mass of those above the ones that t adds, and the value of the latter, if they are tied (else -inf).
    """
    bottom = low
    ceiling = tl.minimum(high, top)
    step = tl.arange(0, THRESHOLDS)
    tied = low * 0.0 + float("-inf")
    count_all = count_low
    mass_all = mass_low
    count_above = count_high
    mass_above = mass_high
    lowest = low
    highest = high
    tries = 0
    searching = (count_low - count_high > 1) & (low < high)
    while searching:
        thresholds = tl.minimum(bottom + (ceiling - bottom) * ((step + 1).to(tl.float32) / THRESHOLDS), ceiling)
        counts = tl.zeros([THRESHOLDS, BLOCK], tl.int32)
        masses = tl.zeros([THRESHOLDS, BLOCK], tl.float32)
        smallest = tl.full([BLOCK], float("inf"), tl.float32)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = scaled(tl.load(source + at, mask=at < size, other=float("-inf")), heat)
            inside = (x >= lowest) & (x < highest)
            above = inside[None, :] & (x[None, :] >= thresholds[:, None])
            counts += above.to(tl.int32)
            masses += tl.where(above, tl.exp(x - top)[None, :], 0.0)
            between = inside & (x >= low) & (x < high)
            smallest = tl.minimum(smallest, tl.where(between, x, float("inf")))
            largest = tl.maximum(largest, tl.where(between, x, float("-inf")))
        bottom = tl.min(smallest, axis=0)
        ceiling = tl.max(largest, axis=0)
        if bottom >= ceiling:
            tied = tl.where(bottom == ceiling, bottom, tied)
            searching = False
        else:
            count = tl.sum(counts, axis=1) + count_above
            mass = tl.sum(masses, axis=1) + mass_above
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
            bottom = tl.maximum(low, bottom)
            ceiling = tl.minimum(high, ceiling)
    return low, mass_low, mass_high, tied
