"""How the keys of a decoding request are cut into parts; decided on the device, as graphs outlive their requests."""

import triton
import triton.language as tl

LEAST_KEYS = 128  # of a part, but for the last
LONG_KEYS = 1024  # of a part, beyond which it would run on alone after shorter requests have ended


@triton.jit
def split_length(
    num_keys,
    fill,
    num_splits,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr = LEAST_KEYS,
    LONG: tl.constexpr = LONG_KEYS,
):
    """Keys of one part, a multiple of KEYS: `fill` equal parts whatever the length, neither too short nor too long.

    There are at most num_splits parts, even where that makes them longer.
    """
    parts = tl.minimum(tl.maximum(fill, tl.cdiv(num_keys, LONG)), num_splits)
    return tl.cdiv(tl.maximum(tl.cdiv(num_keys, parts), LEAST), KEYS) * KEYS


@triton.jit
def first_key(seq_len, WINDOW: tl.constexpr):
    """The first position that the last token sees."""
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0)
    else:
        first = seq_len * 0
    return first
