"""Counter-based random numbers: a pure function of (seed, position), with no state to carry.

A request's n-th random number therefore doesn't depend on what else is in the batch, on the order of
steps, or on preemption. The generator is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators", https://doi.org/10.1145/2660193.2660195): a Weyl sequence through a
64-bit finalizer, the one of D. Stafford ("Better bit mixing", variant 13). The same finalizer turns a
seed into the start of its sequence, so neighbouring seeds are unrelated. Not for cryptography.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the Weyl sequence has full period
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31 = np.uint64(30), np.uint64(27), np.uint64(31)
_SHIFT_TO_24_BITS = np.uint64(40)
_2_POW_MINUS_24 = np.float32(2.0**-24)
_64_BITS = (1 << 64) - 1


def seed_key(seed: int) -> int:
    """The 64-bit start of a seed's sequence. Any int, taken modulo 2^64; distinct seeds get distinct keys."""
    start = np.array([(seed + int(_GOLDEN)) & _64_BITS], dtype=np.uint64)
    return int(_mix_(start)[0])


def uniform_of_key(key: NDArray[np.uint64], position: ArrayLike) -> NDArray[np.float32]:
    """float32 in [0, 1), a multiple of 2^-24, for each key (see `seed_key`) and position >= 0, broadcast."""
    z = np.atleast_1d(position).astype(np.uint64) + np.uint64(1)
    z = _mix_(z * _GOLDEN + key)
    z >>= _SHIFT_TO_24_BITS
    # 24 bits are what a float32 holds exactly: rounding can never make a 1.0 of it.
    return z.astype(np.float32) * _2_POW_MINUS_24


def uniform(seed: ArrayLike, position: ArrayLike) -> NDArray[np.float32]:
    """float32 in [0, 1) for each (seed, position), broadcast; seeds are uint64."""
    keys = _mix_(np.atleast_1d(seed).astype(np.uint64) + _GOLDEN)
    return uniform_of_key(keys, position)


def _mix_(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Stafford's variant 13, in place: a bijection whose every output bit depends on all input bits."""
    z ^= z >> _SHIFT_30
    z *= _MULTIPLIER_1
    z ^= z >> _SHIFT_27
    z *= _MULTIPLIER_2
    z ^= z >> _SHIFT_31
    return z
