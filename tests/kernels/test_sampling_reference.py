"""The `sample` op against HF's logits processors, exact distributions, and its promises on rounding and batches.

Each test runs for the reference and for the C++ kernels.
"""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from atom.kernels import cpu
from atom.kernels.torch import sampling as reference
from atom.kernels.torch.sampling import _FEW_CANDIDATES, _filter_, greedy, sample, top_logits


@pytest.fixture(autouse=True, scope="module", params=["torch", "cpu"])
def backend(request):
    """Puts the backend's ops in the place of `sample` and `greedy`."""
    module = sys.modules[__name__]
    if request.param == "cpu":
        if cpu.unavailable_reason():
            pytest.skip(cpu.unavailable_reason())
        from atom.kernels.cpu import sampling

        module.sample, module.greedy = sampling.sample, sampling.greedy
    yield request.param
    module.sample, module.greedy = reference.sample, reference.greedy


def draw(logits, uniform, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """`sample` of one row of logits for many uniform numbers."""
    rows = len(uniform)

    def full(value, dtype=torch.float32):
        return None if value is None else torch.full((rows,), value, dtype=dtype)

    return sample(
        logits.expand(rows, -1).contiguous(),
        full(temperature),
        full(top_k, torch.int32),
        full(top_p),
        full(min_p),
        torch.as_tensor(uniform, dtype=torch.float32),
    ).numpy()


def stratified(count):
    """The inverse of a distribution function over an even grid hits every set by its measure, within one step."""
    return (np.arange(count) + 0.5) / count


def expected_distribution(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Straightforward float64 numpy: probabilities of each token, [V]."""
    scaled = (logits.numpy() / np.float32(temperature)).astype(np.float64)
    order = np.lexsort((np.arange(len(scaled)), -scaled))  # likeliest first, the lower id of a tie first
    probability = np.exp(scaled - scaled.max())
    kept = np.ones(len(scaled), dtype=bool)
    if min_p is not None:
        kept &= probability >= np.float32(min_p)
    if top_k is not None:
        kept &= scaled >= scaled[order[min(top_k, len(scaled)) - 1]]
    probability = np.where(kept, probability, 0)
    probability /= probability.sum()
    if top_p is not None:
        cumulative = np.cumsum(probability[order])
        size = min(int(np.searchsorted(cumulative, np.float32(top_p))) + 1, len(scaled))
        probability[order[size:]] = 0
    return probability / probability.sum()


def chi_square_is_plausible(tokens, probability):
    """Pearson's statistic over tokens (rare ones pooled) is below mean + 5 standard deviations."""
    counts = np.bincount(tokens, minlength=len(probability))
    assert counts[probability == 0].sum() == 0, "drew a token of probability 0"
    expected = probability * len(tokens)
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = max(len(observed) - 1, 1)
    return statistic < freedom + 5 * np.sqrt(2 * freedom)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 300, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 1000])
def test_distribution_is_exact(vocab_size, filters):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(vocab_size, generator=generator) * 2
    probability = expected_distribution(logits, **filters)
    uniform = np.random.default_rng(0).random(8000, dtype=np.float32)
    assert chi_square_is_plausible(draw(logits, uniform, **filters), probability)
    # Without the noise of random numbers, every token's share is right to the width of the grid.
    share = np.bincount(draw(logits, stratified(8000), **filters), minlength=vocab_size) / 8000
    np.testing.assert_allclose(share, probability, atol=2 / 8000)


def test_the_statistic_notices_a_wrong_distribution():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1))
    uniform = np.random.default_rng(0).random(8000, dtype=np.float32)
    assert not chi_square_is_plausible(draw(logits, uniform), expected_distribution(logits, temperature=1.1))


@pytest.mark.parametrize("vocab_size", [3, 255, 256, 257, 1000, 20001])
def test_tokens_follow_the_order_of_ids(vocab_size):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3))
    uniform = np.random.default_rng(1).random(100, dtype=np.float32)
    cumulative = np.cumsum(expected_distribution(logits))
    expected = np.searchsorted(cumulative, uniform.astype(np.float64), side="right")
    np.testing.assert_array_equal(draw(logits, uniform), expected)


def kept_tokens(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Ids of the tokens whose probability isn't 0."""

    def row(value, dtype=torch.float32):
        return None if value is None else torch.tensor([value], dtype=dtype)

    scaled = logits.unsqueeze(0) / temperature
    weights = scaled.softmax(-1)
    _filter_(weights, scaled, row(temperature), row(top_k, torch.int32), row(top_p), row(min_p))
    return weights[0].nonzero().squeeze(1).numpy()


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-6, 6), min_size=2, max_size=24).map(lambda values: torch.tensor(values) / 2),
    temperature=st.sampled_from([0.7, 1.0, 1.5, 4.0]),
    top_k=st.none() | st.integers(1, 24),
    top_p=st.none() | st.sampled_from([1e-6, 0.13, 0.37, 0.61, 0.83, 0.97]),
    min_p=st.none() | st.sampled_from([0.003, 0.07, 0.3, 0.9]),
)
def test_kept_tokens_equal_those_of_transformers(logits, temperature, top_k, top_p, min_p):
    scores = TemperatureLogitsWarper(temperature)(None, logits.unsqueeze(0))
    if min_p is not None:
        scores = MinPLogitsWarper(min_p)(None, scores)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)

    kept = kept_tokens(logits, temperature, top_k, top_p, min_p)
    # transformers keeps any of the tokens that tie at the border of top-p, so compare values.
    assert sorted(logits[kept].tolist()) == sorted(logits[scores[0] > -torch.inf].tolist())


def test_top_p_keeps_the_lowest_ids_of_a_tie():
    logits = torch.zeros(2000)
    assert kept_tokens(logits[:10], top_p=0.25).tolist() == [0, 1, 2]
    # More than the candidates that are looked at first.
    assert kept_tokens(logits, top_p=0.29975).tolist() == list(range(600))
    logits[1000] = 1.0
    assert kept_tokens(logits, top_p=1e-9).tolist() == [1000]


def test_top_k_keeps_ties():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert kept_tokens(logits, top_k=2).tolist() == [1, 2, 3, 4]
    assert len(kept_tokens(torch.zeros(5000), top_k=3)) == 5000


def test_filters_that_need_more_than_the_first_candidates():
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(5)) * 0.1
    for filters in (
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_k": 3000},
        {"min_p": 0.7},
        {"top_k": 4000, "top_p": 0.7, "min_p": 0.65},
    ):
        probability = expected_distribution(logits, **filters)
        assert (probability > 0).sum() > _FEW_CANDIDATES
        np.testing.assert_array_equal(kept_tokens(logits, **filters), np.flatnonzero(probability))


MIXES = [
    {"top_k": 50},
    {"top_k": 2000, "temperature": 0.9},
    {"top_p": 0.9},
    {"top_p": 0.99, "temperature": 5.0},
    {"min_p": 0.1},
    {"min_p": 1e-5, "top_k": 40, "top_p": 0.95, "temperature": 0.6},
    {"temperature": 0.0},
    {"temperature": 0.8},
    {},
]


@pytest.mark.parametrize("vocab_size", [1003, 4096])
def test_a_row_does_not_depend_on_the_batch(vocab_size, backend, monkeypatch):
    """Bitwise, for the reference: the weights that every token is drawn from are compared, not just the tokens."""
    seen = []
    inverse_cdf = reference._inverse_cdf
    monkeypatch.setattr(reference, "_inverse_cdf", lambda w, u: seen.append(w.clone()) or inverse_cdf(w, u))
    generator = torch.Generator().manual_seed(7)
    rows = 27
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    logits[::4] = (logits[::4] * 2).round() / 2  # rows with many ties, as bfloat16 gives
    uniform = torch.rand(rows, generator=generator)
    mixed = [MIXES[i % len(MIXES)] for i in range(rows)]
    temperature = torch.tensor([m.get("temperature", 1.0) for m in mixed])
    top_k = torch.tensor([m.get("top_k", vocab_size) for m in mixed], dtype=torch.int32).clamp(max=vocab_size)
    top_p = torch.tensor([m.get("top_p", 1.0) for m in mixed])
    min_p = torch.tensor([m.get("min_p", 0.0) for m in mixed])

    together = sample(logits, temperature, top_k, top_p, min_p, uniform)
    weights = seen.pop() if backend == "torch" else None
    for r in range(rows):
        alone = {name: mixed[r].get(name) for name in ("top_k", "top_p", "min_p")}
        token = draw(logits[r], uniform[r : r + 1], mixed[r].get("temperature", 1.0), **alone)
        assert token[0] == together[r]
        if weights is not None:
            torch.testing.assert_close(seen.pop()[0], weights[r], rtol=0, atol=0, equal_nan=True)
    # Nor on the order of rows, nor on how many threads share the work.
    order = torch.randperm(rows, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = sample(logits[order], temperature[order], top_k[order], top_p[order], min_p[order], uniform[order])
    finally:
        torch.set_num_threads(threads)
    if weights is not None:
        torch.testing.assert_close(seen.pop(), weights[order], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again, together[order])


LAST = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.mark.parametrize("uniform", [0.0, 1e-38, 2.0**-24, 0.5, LAST])
def test_tokens_of_probability_zero_are_never_drawn(uniform):
    for vocab_size in (5, 256, 700, 4096):
        for possible in ([0], [vocab_size - 1], [vocab_size // 2], [1, vocab_size - 2]):
            logits = torch.full((vocab_size,), -torch.inf)
            logits[possible] = torch.arange(len(possible), dtype=torch.float32)
            assert draw(logits, [uniform])[0] in possible
            logits[logits.isinf()] = -200.0  # underflows instead
            assert draw(logits, [uniform])[0] in possible


@pytest.mark.parametrize("uniform", [0.0, LAST])
def test_borders_of_long_distributions(uniform):
    """The sum over many tokens rounds; the last number below 1 must still end inside."""
    generator = torch.Generator().manual_seed(11)
    for vocab_size in (49152, 50257):
        logits = torch.randn(vocab_size, generator=generator)
        logits[:100] = logits[-100:] = -torch.inf
        token = draw(logits, [uniform])[0]
        assert 100 <= token < vocab_size - 100
        assert token == 100 or uniform > 0


def test_uniform_may_be_float64_and_just_below_one():
    logits = torch.zeros(1, 5000)
    top = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample(logits, torch.ones(1), None, None, None, top).item() == 4999


def test_temperature_zero_is_greedy_in_any_batch():
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(2))
    logits[4] -= 100  # all negative
    logits[5] = 0  # all equal
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    top_k = torch.full((6,), 5, dtype=torch.int32)
    tokens = sample(logits, temperature, top_k, None, None, torch.full((6,), 0.99))
    expected = logits.argmax(-1)
    assert torch.equal(tokens[temperature == 0], expected[temperature == 0])


def test_extreme_temperatures():
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(4)) * 50
    for temperature in (1e-5, 1e-30, 1e-45):
        assert (draw(logits, stratified(50), temperature) == int(logits.argmax())).all()
    hot = draw(logits[:300], stratified(3000), 1e5)
    assert np.bincount(hot, minlength=300).min() >= 9  # flat: about 10 each
    assert (draw(logits, stratified(50), 1e5, top_k=1) == int(logits.argmax())).all()


def test_huge_and_undefined_logits():
    logits = torch.zeros(6, 600)
    logits[0, 77] = 3e38  # overflows when divided by the temperature
    logits[1, 78] = torch.inf
    logits[2, 79] = torch.nan
    logits[3] = -torch.inf
    logits[4] = -3e38
    logits[4, 80] = -2e38
    logits[5, 81] = 1e4
    before = logits.clone()
    one = torch.ones(6)
    for filters in (
        (None, None, None),
        (torch.full((6,), 5, dtype=torch.int32), one * 0.9, one * 0.1),
        (None, one * 0.9999, None),
    ):
        tokens = sample(logits, one * 0.5, *filters, one * 0.3).tolist()
        assert tokens == [77, 78, 79, 0, 80, 81]
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocab_size", [1, 2, 256, 257, 1000, 49152])
def test_greedy_is_argmax(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(9, vocab_size, generator=generator).bfloat16().float()  # rounded: with ties
    logits[0] = -torch.inf
    logits[1, -1] = torch.inf
    logits[2, vocab_size // 3] = torch.nan
    assert torch.equal(greedy(logits), logits.argmax(-1))
    assert torch.equal(greedy(logits[3:4]), logits[3:4].argmax(-1))
    assert greedy(logits[:0]).shape == (0,)


@pytest.mark.parametrize("vocab_size", [10, 5000, 49152 + 7])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_top_logits_is_topk(vocab_size, k):
    k = min(k, vocab_size)
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(k))
    logits[1] = logits[1].round()
    logits[2] = -torch.inf
    logits[3, -3:] = 50.0
    values, ids = top_logits(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_no_rows():
    empty = torch.empty(0)
    assert sample(torch.empty(0, 500), empty, None, None, None, empty).shape == (0,)
    assert sample(torch.empty(0, 500), empty, empty.int(), empty, empty, empty).shape == (0,)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("vocab_size", [1003, 49152])
def test_backends_draw_the_same_tokens(vocab_size, spread):
    """Up to the rounding of weights, which moves few borders between tokens over a draw's number."""
    generator = torch.Generator().manual_seed(vocab_size)
    rows = 60
    logits = torch.randn(rows, vocab_size, generator=generator) * spread
    logits[::3] = logits[::3].bfloat16().float()  # with ties
    uniform = torch.rand(rows, generator=generator)
    mixed = [MIXES[i % len(MIXES)] for i in range(rows)]
    arguments = (
        torch.tensor([m.get("temperature", 1.0) for m in mixed]),
        torch.tensor([min(m.get("top_k", vocab_size), vocab_size) for m in mixed], dtype=torch.int32),
        torch.tensor([m.get("top_p", 1.0) for m in mixed]),
        torch.tensor([m.get("min_p", 0.0) for m in mixed]),
        uniform,
    )
    same = sample(logits, *arguments) == reference.sample(logits, *arguments)
    assert same.float().mean() > 0.95
