"""Choosing tokens from logits without sorting them.

Programs look at parts of all rows at once: first at what each part holds, then, in a few passes, at where the row's
filters cut (`sampling_cut`). One program a row then inverts the distribution function of what is left: it knows how
much each part keeps, so it reads one of them.
"""

import torch
import triton
import triton.language as tl

from atom.kernels.triton.launch import CHIP, next_power_of_2, num_multiprocessors, overlap_options
from atom.kernels.triton.overlap import let_next_begin, wait_for_inputs
from atom.kernels.triton.sampling_cut import collect_kernel, narrow_kernel, row_facts, row_filters, scaled, search

_PART = 2048  # logits measured together
_PART_WARPS = 4
# Values that a pass measures a part at, passes, and logits that a program of one holds against all values at once.
_THRESHOLDS = 16
_PASSES = 2
_PASS_BLOCK = _PART if CHIP == "interpret" else 128
_PASS_WARPS = 4
# Room for the tokens of a row that are in doubt after the passes; where more are, one program reads the whole row.
_CAPACITY = 4096
_FINAL_BLOCK = 4096 if CHIP == "interpret" else 512
_SHARE_BLOCK = 4096 if CHIP == "interpret" else 64  # candidates that are added to their parts at once
_FINAL_THRESHOLDS = 8
_FINAL_WARPS = 8
# Programs of a pass for each multiprocessor: fewer read the last pass's results less often.
_PROGRAMS = 16


@triton.jit
def _part_kernel(
    logits,
    temperature,
    tops,
    top_ids,
    bottoms,
    sums,
    stride,
    vocab_size,
    PART: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Of part i of row r: its largest logit (NaN if it holds one), the first id of that, its smallest finite logit.

    And the sum of exp(scaled - scaled largest).
    """
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    ids = part * PART + tl.arange(0, PART)
    wait_for_inputs(OVERLAP)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
    heat = tl.load(temperature + row)
    heat = tl.where(heat == 0.0, 1.0, heat)
    is_nan = x != x
    numbers = tl.where(is_nan, float("-inf"), x)
    top = tl.max(numbers, axis=0)
    bottom = tl.min(tl.where(numbers > float("-inf"), numbers, float("inf")), axis=0)
    top_id = tl.min(tl.where(numbers == top, ids, vocab_size - 1), axis=0)
    nan_id = tl.min(tl.where(is_nan, ids, vocab_size), axis=0)
    least = tl.where(top == float("-inf"), 0.0, top)
    # NaN and +inf make the sum NaN, which marks a row without a distribution.
    total = tl.sum(tl.exp(scaled(x, heat) - scaled(tl.broadcast_to(least, x.shape), heat)), axis=0)
    at = row * tl.num_programs(1) + part
    tl.store(tops + at, tl.where(nan_id < vocab_size, float("nan"), top))
    tl.store(top_ids + at, tl.where(nan_id < vocab_size, nan_id, top_id))
    tl.store(bottoms + at, bottom)
    tl.store(sums + at, total)


@triton.jit(do_not_specialize=["num_parts", "capacity"])
def _sample_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    tops,
    bottoms,
    sums,
    top_ids,
    candidates,
    lengths,
    in_range,
    kept_masses,
    smallest,
    largest,
    bounds,
    bound_counts,
    tokens,
    stride,
    vocab_size,
    num_parts,
    capacity,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    NARROWED: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE_BLOCK: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program r samples row r, with what the other kernels found; PARTS is a power of two, num_parts or more."""
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    exists = parts < num_parts
    at = row * num_parts + parts
    wait_for_inputs(OVERLAP)
    # The first of the largest logits, or the first NaN.
    part_tops = tl.load(tops + at, mask=exists, other=float("-inf"))
    part_ids = tl.load(top_ids + at, mask=exists, other=vocab_size)
    is_nan = part_tops != part_tops
    nan_id = tl.min(tl.where(is_nan, part_ids, vocab_size), axis=0)
    numbers = tl.where(is_nan, float("-inf"), part_tops)
    top_id = tl.min(tl.where(numbers == tl.max(numbers, axis=0), part_ids, vocab_size), axis=0)
    token = tl.where(nan_id < vocab_size, nan_id, top_id)

    is_drawn, heat, top, _row_bottom, _row_mass, masses = row_facts(
        temperature, tops, bottoms, sums, row, num_parts, PARTS
    )
    if is_drawn:
        row_logits = logits + row * stride
        # Kept: scaled logits not below least; of those that equal `border` only the first num_border.
        least = tl.full([], float("-inf"), tl.float32)
        border = tl.full([], float("inf"), tl.float32)
        num_border = tl.full([], 0, tl.int32) + vocab_size
        tied = tl.zeros([PARTS], tl.int32)
        if HAS_TOP_K or HAS_TOP_P or HAS_MIN_P:
            k, p, _floor, is_filtered, _num_k = row_filters(
                top_k, top_p, min_p, row, vocab_size, top, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P, 16
            )
            if is_filtered:
                masses = tl.load(kept_masses + at, mask=exists, other=0.0)
                least = tl.load(bounds + row * 8)
                if NARROWED:
                    # Candidates are looked at where they have been collected, or all over the row.
                    sizes = tl.load(lengths + at, mask=exists, other=0)
                    starts = tl.cumsum(sizes, axis=0) - sizes
                    size = tl.sum(sizes, axis=0)
                    source = candidates + row * capacity
                    if size > capacity:
                        starts = parts * PART
                        sizes = tl.full([PARTS], PART, tl.int32)
                        size = tl.full([], 0, tl.int32) + vocab_size
                        source = row_logits
                    by_mass = p < 1.0
                    # Of the last cut's range.
                    bottom = tl.min(tl.load(smallest + at, mask=exists, other=float("inf")), axis=0)
                    ceiling = tl.max(tl.load(largest + at, mask=exists, other=float("-inf")), axis=0)
                    is_one_value = bottom == ceiling
                    if (k < vocab_size) | by_mass:
                        high = tl.load(bounds + row * 8 + 1)
                        mass = tl.load(bounds + row * 8 + 4)
                        if HAS_TOP_K:
                            least, mass, _mass_beyond_k, _kth = search(
                                source,
                                size,
                                heat,
                                top,
                                least,
                                tl.where(is_one_value & ~by_mass, least, high),
                                True,
                                k,
                                tl.load(bound_counts + row * 4),
                                tl.load(bound_counts + row * 4 + 1),
                                mass,
                                tl.load(bounds + row * 8 + 5),
                                BLOCK,
                                THRESHOLDS,
                            )
                        if HAS_TOP_P:
                            high = tl.where(by_mass, tl.load(bounds + row * 8 + 3), high)
                            if by_mass:
                                enough = mass * p
                                least, _mass_kept, mass_above, found = search(
                                    source,
                                    size,
                                    heat,
                                    top,
                                    tl.maximum(least, tl.load(bounds + row * 8 + 2)),
                                    tl.where(is_one_value, float("-inf"), high),
                                    False,
                                    enough,
                                    tl.load(bound_counts + row * 4 + 2),
                                    tl.load(bound_counts + row * 4 + 3),
                                    mass,
                                    tl.load(bounds + row * 8 + 6),
                                    BLOCK,
                                    THRESHOLDS,
                                )
                                found = tl.where(is_one_value, bottom, found)
                                if found >= least:
                                    border = found
                                    missing = tl.ceil((enough - mass_above) / tl.exp(border - top))
                                    most = tl.minimum(missing, num_border.to(tl.float32))
                                    num_border = tl.maximum(most, 1.0).to(tl.int32)
                        if is_one_value:
                            # How often each part has it is known.
                            border = bottom
                            tied = tl.load(in_range + at, mask=exists, other=0)
                        else:
                            for start in range(0, size, SHARE_BLOCK):
                                place = start + tl.arange(0, SHARE_BLOCK)
                                x = scaled(tl.load(source + place, mask=place < size, other=float("-inf")), heat)
                                is_kept = (x >= least) & (x < high) & (x != border)
                                weight = tl.where(is_kept, tl.exp(x - top), 0.0)
                                offset = place[None, :] - starts[:, None]
                                inside = (offset >= 0) & (offset < sizes[:, None])
                                masses += tl.sum(tl.where(inside, weight[None, :], 0.0), axis=1)
                                tied += tl.sum((inside & (x == border)[None, :]).to(tl.int32), axis=1)
                        kept_ties = tl.minimum(tl.maximum(num_border - (tl.cumsum(tied, axis=0) - tied), 0), tied)
                        masses += kept_ties * tl.exp(tl.minimum(border - top, 0.0))

        # The part that holds the answer, then the token in it: the first whose cumulative mass exceeds the target.
        cumulative = tl.cumsum(masses.to(tl.float64), axis=0)
        target = tl.load(uniform + row).to(tl.float64) * tl.max(cumulative, axis=0)
        first = tl.min(tl.where((cumulative > target) & (masses > 0.0), parts, PARTS), axis=0)
        last = tl.max(tl.where(masses > 0.0, parts, -1), axis=0)
        chosen = tl.minimum(first, last)
        inside_mass = tl.sum(tl.where(parts == chosen, masses, 0.0), axis=0).to(tl.float64)
        before = tl.sum(tl.where(parts == chosen, cumulative, 0.0), axis=0) - inside_mass
        fraction = tl.maximum((target - before) / inside_mass, 0.0).to(tl.float32)
        ties_before = tl.sum(tl.where(parts < chosen, tied, 0), axis=0)

        ids = chosen * PART + tl.arange(0, PART)
        x = scaled(tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf")), heat)
        is_kept = x >= least
        if HAS_TOP_P:
            is_border = x == border
            rank = ties_before + tl.cumsum(is_border.to(tl.int32), axis=0)
            is_kept = is_kept & (~is_border | (rank <= num_border))
        weights = tl.where(is_kept, tl.exp(x - top), 0.0)
        reached = tl.cumsum(weights, axis=0)
        # The part's sum is rounded differently here: go by the fraction of it.
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
    num_parts = triton.cdiv(vocab_size, _PART)
    padded_parts = max(next_power_of_2(num_parts), 64)  # few kinds of kernels
    has = (top_k is not None, top_p is not None, min_p is not None)
    filters = (logits, temperature, top_k, top_p, min_p)
    passes = _PASSES if has[0] or has[1] else 0
    overlap = overlap_options(logits.device)
    per_part = rows * num_parts
    sizes = [per_part] * 4
    if any(has):
        sizes += [rows * _CAPACITY if passes else 0, *[per_part] * 5, rows * 8, rows * 4]
        sizes += [rows * _THRESHOLDS, per_part * _THRESHOLDS, per_part * _THRESHOLDS] * passes
    sizes = [-(-size // 4) * 4 for size in sizes]  # keeps pointers aligned
    memory = torch.empty(sum(sizes), dtype=torch.float32, device=logits.device)
    floats, ints = memory.split(sizes), memory.view(torch.int32).split(sizes)
    facts = (floats[0], floats[1], floats[2])
    _part_kernel[(rows, num_parts)](
        logits,
        temperature,
        floats[0],
        ints[3],
        floats[1],
        floats[2],
        logits.stride(0),
        vocab_size,
        _PART,
        num_warps=_PART_WARPS,
        **overlap,
    )
    found: tuple[torch.Tensor | None, ...] = (None,) * 8
    if any(has):
        found = (floats[4], ints[5], ints[6], floats[7], floats[8], floats[9], floats[10], ints[11])
        programs = -(-_PROGRAMS * num_multiprocessors(logits.device) // rows)
        parts_a_program = -(-num_parts // min(programs, num_parts))
        grid = (rows, -(-num_parts // parts_a_program))
        last: tuple[torch.Tensor | None, ...] = (None, None, None)
        for i in range(passes):
            measured = (floats[12 + 3 * i], ints[13 + 3 * i], floats[14 + 3 * i])
            narrow_kernel[grid](
                *filters,
                *facts,
                *last,
                *measured,
                logits.stride(0),
                vocab_size,
                num_parts,
                parts_a_program,
                *has,
                i == 0,
                has[0] or i == passes - 1,
                _PART,
                padded_parts,
                _PASS_BLOCK,
                _THRESHOLDS,
                num_warps=_PASS_WARPS,
                **overlap,
            )
            last = measured
        collect_kernel[grid](
            *filters,
            *facts,
            *last,
            *found,
            logits.stride(0),
            vocab_size,
            num_parts,
            parts_a_program,
            _CAPACITY,
            *has,
            passes > 0,
            _PART,
            padded_parts,
            _THRESHOLDS,
            num_warps=_PART_WARPS,
            **overlap,
        )
    _sample_kernel[(rows,)](
        *filters,
        uniform,
        *facts,
        ints[3],
        *found,
        tokens,
        logits.stride(0),
        vocab_size,
        num_parts,
        _CAPACITY,
        *has,
        passes > 0,
        _PART,
        padded_parts,
        _FINAL_BLOCK,
        _SHARE_BLOCK,
        _FINAL_THRESHOLDS,
        num_warps=_FINAL_WARPS,
        **overlap,
    )
    return tokens
