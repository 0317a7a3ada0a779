"""Uniformity and independence of the counter-based random numbers, with known answers of SplitMix64."""

import numpy as np
import pytest

from atom.utils.rng import seed_key, uniform, uniform_of_key

COUNT = 200_000


def chi_square(cells, num_cells):
    """Standard deviations by which Pearson's statistic misses its mean."""
    expected = len(cells) / num_cells
    statistic = ((np.bincount(cells, minlength=num_cells) - expected) ** 2 / expected).sum()
    return (statistic - (num_cells - 1)) / np.sqrt(2 * (num_cells - 1))


SEQUENCES = {
    "one seed, successive positions": uniform(12345, np.arange(COUNT)),
    "seed 0": uniform(0, np.arange(COUNT)),
    "adjacent seeds, first position": uniform(np.arange(COUNT), 0),
    "adjacent seeds, a later position": uniform(np.arange(COUNT), 777),
    "seeds that differ in high bits": uniform(np.arange(COUNT, dtype=np.uint64) << np.uint64(44), 3),
    "seed and position move together": uniform(np.arange(COUNT), np.arange(COUNT)),
    "seed and position move apart": uniform(np.arange(COUNT), np.arange(COUNT)[::-1]),
}


@pytest.mark.parametrize("values", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_uniform_and_free_of_serial_correlation(values):
    assert values.dtype == np.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(chi_square((values * 1024).astype(int), 1024)) < 5
    # The low bits too: they choose among tokens of little probability.
    low = (values.astype(np.float64) * 2**24).astype(int) % 1024
    assert abs(chi_square(low, 1024)) < 5
    for lag in (1, 2, 7):
        pairs = (values[:-lag] * 32).astype(int) * 32 + (values[lag:] * 32).astype(int)
        assert abs(chi_square(pairs, 1024)) < 5
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / np.sqrt(COUNT)


def test_sequences_of_adjacent_seeds_are_independent():
    sequences = uniform(np.arange(40)[:, None], np.arange(5000))
    correlation = np.corrcoef(sequences) - np.eye(40)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(5000)
    # Nor is one the other shifted: a Weyl sequence that starts one step later would be.
    assert not np.isin(sequences[0, :100], sequences[1, :200]).sum() > 3


def test_the_statistic_notices_bad_numbers():
    assert chi_square(np.arange(COUNT) % 1000, 1024) > 5


def test_positions_of_a_seed_are_splitmix64():
    """With a key of 0 the outputs are those that Vigna's splitmix64.c gives for the state 0."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    expected = [(word >> 40) / 2**24 for word in known]
    np.testing.assert_array_equal(uniform_of_key(np.zeros(1, np.uint64), np.arange(4)), np.float32(expected))


def test_value_depends_on_seed_and_position_alone():
    seeds, positions = np.array([5, 6, 2**64 - 1], dtype=np.uint64), np.array([0, 9, 10**9])
    together = uniform(seeds, positions)
    for i in range(3):
        assert uniform(seeds[i], positions[i])[0] == together[i]
        key = np.array([seed_key(int(seeds[i]))], dtype=np.uint64)
        assert uniform_of_key(key, positions[i : i + 1])[0] == together[i]


def test_any_int_is_a_seed():
    keys = {seed_key(seed) for seed in (0, 1, -1, 2**63, 2**64 - 2, -(2**63) + 1, 10**30)}
    assert len(keys) == 7
    assert seed_key(-1) == seed_key(2**64 - 1)
