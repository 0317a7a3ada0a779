"""Choosing tokens from logits, the reference.

One uniform number a row and the inverse of the row's own distribution function, in order of token
ids: a row's token depends on that row alone, never on the batch. Nothing is sorted unless a row's
top-p set is larger than the candidates looked at first.
"""

from collections.abc import Callable

import numpy as np
import torch

# Rows are summed in blocks, then only the block that holds the answer is looked at closely.
_BLOCK = 256
_CANDIDATE_BLOCK = 32
# A product with it is below the other factor, also after rounding to float64.
_JUST_BELOW_ONE = 1 - 2.0**-52
# Logits that a thread works on at a time.
_ELEMENTS_A_THREAD = 1 << 18
# How many of the likeliest tokens are looked at first, and next, before all are: nearly every top-p
# set of a language model is within the first, and few are larger than the second.
_FEW_CANDIDATES = 128
_MANY_CANDIDATES = 2048


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """float [R, V] -> int64 [R]: the first of the largest (or the first NaN)."""
    rows, vocab_size = logits.shape
    if logits.device.type != "cpu" or vocab_size <= _BLOCK or not rows:
        return logits.argmax(-1)
    # torch's argmax isn't vectorized on CPU, amax is: find the block first.
    block = _per_block(logits, _BLOCK, torch.amax).argmax(-1, keepdim=True)
    # The last, shorter block is looked at with some of its left neighbour, whose values are smaller.
    start = (block * _BLOCK).clamp_(max=vocab_size - _BLOCK)
    inside = logits.gather(1, start + torch.arange(_BLOCK, device=logits.device))
    return (start + inside.argmax(-1, keepdim=True)).squeeze(1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """One token a row from softmax(logits / temperature) after its filters; int64 [R].

    logits: float32 [R, V], not changed; temperature: float32 [R], 0 = greedy; top_k: int [R], V = off;
    top_p, min_p: float32 [R], 1 and 0 = off; uniform: float [R] in [0, 1). A filter that is None is
    off for all rows. Filters act in the order of vLLM, each on what the ones before left:
    min_p keeps tokens at least min_p times as likely as the likeliest; top_k those with a logit
    not below the k-th largest (all that tie with it); top_p, on the renormalized rest, the smallest
    set of the likeliest with at least that probability, one token or more, the lower ids of a tie first.
    The answer is the first token id whose cumulative probability exceeds `uniform`, so a token of
    probability 0 is never chosen. A row without a distribution (all -inf, NaN, +inf) is greedy.
    """
    at_once = len(logits)
    if logits.device.type == "cpu":
        # A part's temporaries stay in the cache, and small enough for malloc to use them again.
        at_once = max(1, _ELEMENTS_A_THREAD * torch.get_num_threads() // logits.shape[1])
    if len(logits) <= at_once:
        return _sample_rows(logits, temperature, top_k, top_p, min_p, uniform)
    per_row = (logits, temperature, top_k, top_p, min_p, uniform)
    split = [[None] * len(logits) if x is None else x.split(at_once) for x in per_row]
    return torch.cat([_sample_rows(*part) for part in zip(*split, strict=False)])


def _sample_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    # Temperature 0 makes NaN and infinities, and so a row without a distribution.
    scaled = logits if bool((temperature == 1).all()) else logits / temperature.unsqueeze(1)
    weights = torch.softmax(scaled, dim=-1)
    if top_k is not None or top_p is not None or min_p is not None:
        _filter_(weights, scaled, temperature, top_k, top_p, min_p)
    tokens, defined = _inverse_cdf(weights, uniform)
    if not bool(defined.all()):
        rows = (~defined).nonzero().squeeze(1)
        tokens[rows] = greedy(logits[rows])
    return tokens


def top_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk(logits, k, dim=-1) of float [R, V]: values in falling order and ids, [R, k] each.

    The k largest lie in the k blocks with the largest maxima, so only those are searched.
    """
    rows, vocab_size = logits.shape
    num_blocks = vocab_size // _CANDIDATE_BLOCK
    if not rows or k * _CANDIDATE_BLOCK * 4 > vocab_size:
        return logits.topk(k, dim=-1)
    blocked = logits[:, : num_blocks * _CANDIDATE_BLOCK].unflatten(1, (num_blocks, _CANDIDATE_BLOCK))
    chosen = blocked.amax(-1).topk(k, dim=-1, sorted=False).indices
    ids = (chosen.unsqueeze(-1) * _CANDIDATE_BLOCK + torch.arange(_CANDIDATE_BLOCK, device=logits.device)).flatten(1)
    tail = torch.arange(num_blocks * _CANDIDATE_BLOCK, vocab_size, device=logits.device)
    ids = torch.cat([ids, tail.expand(rows, -1)], dim=1)
    values, where = logits.gather(1, ids).topk(k, dim=-1)
    return values, ids.gather(1, where)


def _per_block(x: torch.Tensor, block: int, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[R, V] -> [R, ceil(V / block)], reduced in each block; a row's bits don't depend on R."""
    whole = x.shape[1] // block
    parts = []
    if whole:
        parts.append(reduce(x[:, : whole * block].unflatten(1, (whole, block)), -1))
    if whole * block < x.shape[1]:
        parts.append(reduce(x[:, whole * block :], -1).unsqueeze(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First id whose cumulative weight exceeds uniform * total, and whether a row has one: int64, bool [R].

    cumulative[i] > target >= cumulative[i - 1] can only hold where weight i > 0, whatever the rounding.
    """
    vocab_size = weights.shape[1]
    sums = _per_block(weights, _BLOCK, torch.sum)
    cumulative = sums.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform.unsqueeze(1) * total, total * _JUST_BELOW_ONE)
    # The clamp is for rows of NaN, whose answer is anything.
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block)
    # The float32 sum of the block and the float64 one differ in rounding: go by the fraction.
    fraction = (target - before) / sums.gather(1, block)

    start = block * _BLOCK
    ids = start + torch.arange(_BLOCK, device=weights.device)
    if vocab_size % _BLOCK:
        inside = weights.gather(1, ids.clamp(max=vocab_size - 1)).masked_fill_(ids >= vocab_size, 0.0)
    else:
        inside = weights.gather(1, ids)
    inside = inside.cumsum(-1, dtype=torch.float64)
    total_inside = inside[:, -1:]
    target = torch.minimum(fraction * total_inside, total_inside * _JUST_BELOW_ONE)
    tokens = start + torch.searchsorted(inside, target, right=True)
    return tokens.squeeze(1), total.squeeze(1) > 0


def _filter_(
    weights: torch.Tensor,
    scaled: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> None:
    """Set the weights of the tokens that a row's filters drop to 0. Other rows are not touched."""
    vocab_size = weights.shape[1]
    if top_k is None:
        k = torch.full_like(temperature, vocab_size, dtype=torch.int64)
    else:
        k = top_k.long().clamp(1, vocab_size)
    p = torch.ones_like(temperature) if top_p is None else top_p
    floor = torch.zeros_like(temperature) if min_p is None else min_p
    filtered = ((k < vocab_size) | (p < 1) | (floor > 0)) & (temperature > 0)
    if not bool(filtered.any()):
        return
    if bool(filtered.all()):
        _filter_rows_(weights, scaled, k, p, floor)
    else:
        rows = filtered.nonzero().squeeze(1)
        part = weights[rows]
        _filter_rows_(part, scaled[rows], k[rows], p[rows], floor[rows])
        weights[rows] = part


def _filter_rows_(
    weights: torch.Tensor, scaled: torch.Tensor, k: torch.Tensor, p: torch.Tensor, floor: torch.Tensor
) -> None:
    """`_filter_` for rows that all have a filter. Looks at the likeliest first, at the rest where it must.

    weights: softmax(scaled) [R, V]; k: int64 [R], V = off; p, floor: [R], 1 and 0 = off.
    """
    vocab_size = weights.shape[1]
    limits_k = k < vocab_size
    # One more than k, to see whether the k-th is tied with others.
    useful = torch.where(limits_k, torch.where(k < _MANY_CANDIDATES, k + 1, 0), _FEW_CANDIDATES)
    num = min(max(int(useful.max()), 1), vocab_size)
    values, ids = _likeliest(scaled, num)
    candidates = weights.gather(1, ids)

    # min_p and top_k keep what is not below a threshold.
    kth = values.gather(1, (k - 1).clamp(max=num - 1).unsqueeze(1))
    large_k = (limits_k & (k > num)).nonzero().squeeze(1)
    if len(large_k):
        kth[large_k] = _sorted(scaled[large_k]).gather(1, k[large_k].unsqueeze(1) - 1)
    least_value = torch.where(limits_k.unsqueeze(1), kth, -torch.inf)
    least_weight = floor.unsqueeze(1) * candidates[:, :1]
    kept = (values >= least_value) & (candidates >= least_weight)
    candidates = torch.where(kept, candidates, 0.0)
    limited = limits_k | (floor > 0)
    in_sight = ~kept[:, -1]  # all that is kept is among the candidates
    rows = (limited & in_sight).nonzero().squeeze(1)
    _keep_only_(weights, rows, ids[rows], candidates[rows])
    rows = (limited & ~in_sight).nonzero().squeeze(1)
    if len(rows):
        part = weights[rows]
        weights[rows] = part.masked_fill_((scaled[rows] < least_value[rows]) | (part < least_weight[rows]), 0.0)

    # top_p counts down from the likeliest until there is enough, and looks further where there isn't.
    rows = (p < 1).nonzero().squeeze(1)
    if not len(rows):
        return
    enough = (p.double() * _per_block(weights, _BLOCK, torch.sum).double().sum(-1))[rows]
    values, ids, candidates, in_sight = values[rows], ids[rows], candidates[rows], in_sight[rows]
    while len(rows):
        nucleus, found = _nucleus(values, ids, candidates, enough, whole=num == vocab_size)
        _keep_only_(weights, rows[found], ids[found], nucleus[found])
        if num == vocab_size:
            return
        # Of rows wholly in sight, a sum short of `enough` is rounding: all of it is kept.
        left = ~found & ~in_sight
        rows, enough, in_sight = rows[left], enough[left], in_sight[left]
        num = _MANY_CANDIDATES if num < _MANY_CANDIDATES < vocab_size else vocab_size
        values, ids = _likeliest(scaled[rows], num)
        candidates = weights[rows].gather(1, ids)


def _nucleus(
    values: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, enough: torch.Tensor, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest of the likeliest tokens whose weights add up to `enough`; lower ids of a tie first.

    values, ids, weights: the N likeliest tokens [R, N], values falling; enough: float64 [R]; whole:
    these are all tokens. Returns the weights, 0 outside the set, and which rows' sets are certain: not
    where N are too few, or where the set ends in a tie that may go on after them.
    """
    short = weights.double().cumsum(-1) < enough.unsqueeze(1)
    last = short.sum(-1, keepdim=True).clamp_(max=values.shape[1] - 1)
    border = values.gather(1, last)
    above, at_border = values > border, values == border
    num_tied = last + 1 - above.sum(-1, keepdim=True)
    if bool((at_border.sum(-1, keepdim=True) > num_tied).any()):
        beyond = torch.iinfo(ids.dtype).max
        last_id = torch.where(at_border, ids, beyond).sort(-1).values.gather(1, num_tied - 1)
        at_border &= ids <= last_id
    found = ~short[:, -1]
    if not whole:
        found &= values[:, -1] < border.squeeze(1)
    return torch.where(above | at_border, weights, 0.0), found


def _keep_only_(weights: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> None:
    """In `rows` [N] of weights [R, V], only the weights `kept` [N, C] of tokens `ids` [N, C] remain."""
    if len(rows) == len(weights):
        weights.zero_().scatter_(1, ids, kept)
    else:
        weights.index_fill_(0, rows, 0.0)
        weights[rows.unsqueeze(1), ids] = kept


def _likeliest(scaled: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_logits`, or a full sort if num is the vocabulary size."""
    if num == scaled.shape[1]:
        return scaled.sort(dim=-1, descending=True)
    return top_logits(scaled, num)


def _sorted(x: torch.Tensor) -> torch.Tensor:
    """[R, V] with each row in falling order."""
    if x.device.type == "cpu":  # numpy sorts values alone with SIMD, several times faster
        return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)
    return x.sort(dim=-1, descending=True).values
