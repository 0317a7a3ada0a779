import pytest

from atom.compilation.cuda_graph import Dispatch, GraphDispatcher, capturable_mode
from atom.config import CUDAGraphMode as Mode

SIZES = [8, 1, 4, 2]


@pytest.mark.parametrize(
    ("mode", "num_tokens", "is_decode", "expected"),
    [
        (Mode.NONE, 2, True, Dispatch(Mode.NONE, 2)),
        (Mode.PIECEWISE, 3, True, Dispatch(Mode.PIECEWISE, 4)),
        (Mode.PIECEWISE, 5, False, Dispatch(Mode.PIECEWISE, 8)),
        (Mode.PIECEWISE, 9, False, Dispatch(Mode.NONE, 9)),
        (Mode.FULL, 1, True, Dispatch(Mode.FULL, 1)),
        (Mode.FULL, 7, False, Dispatch(Mode.FULL, 8)),
        (Mode.FULL_DECODE_ONLY, 8, True, Dispatch(Mode.FULL, 8)),
        (Mode.FULL_DECODE_ONLY, 8, False, Dispatch(Mode.NONE, 8)),
        (Mode.FULL_AND_PIECEWISE, 3, True, Dispatch(Mode.FULL, 4)),
        (Mode.FULL_AND_PIECEWISE, 3, False, Dispatch(Mode.PIECEWISE, 4)),
        (Mode.FULL_AND_PIECEWISE, 100, True, Dispatch(Mode.NONE, 100)),
    ],
)
def test_dispatch(mode, num_tokens, is_decode, expected):
    assert GraphDispatcher(mode, SIZES).dispatch(num_tokens, is_decode) == expected


def test_only_steps_with_prompts_use_their_sizes():
    dispatcher = GraphDispatcher(Mode.FULL_AND_PIECEWISE, SIZES, [20, 40])
    assert dispatcher.largest == 40
    assert dispatcher.dispatch(9, False) == Dispatch(Mode.PIECEWISE, 20)
    assert dispatcher.dispatch(41, False) == Dispatch(Mode.NONE, 41)
    assert dispatcher.dispatch(9, True) == Dispatch(Mode.NONE, 9)
    assert GraphDispatcher(Mode.FULL, []).largest == 0


@pytest.mark.parametrize("prompt_sizes", [[], [10, 11]])
@pytest.mark.parametrize("mode", Mode)
def test_everything_dispatched_to_was_captured_from_large_to_small(mode, prompt_sizes):
    dispatcher = GraphDispatcher(mode, SIZES, prompt_sizes)
    captured = dispatcher.captures()
    assert [size for *_, size in captured] == sorted((size for *_, size in captured), reverse=True)
    full = {(is_decode, size) for kind, is_decode, size in captured if kind is Mode.FULL}
    pieces = {size for kind, _, size in captured if kind is Mode.PIECEWISE}
    for num_tokens in range(1, 12):
        for is_decode in (False, True):
            choice = dispatcher.dispatch(num_tokens, is_decode)
            assert choice.size >= num_tokens
            if choice.kind is Mode.FULL:
                assert (is_decode, choice.size) in full
            if choice.kind is Mode.PIECEWISE:
                assert choice.size in pieces


@pytest.mark.parametrize(
    ("mode", "whole", "mixed", "expected"),
    [
        *((mode, True, True, mode) for mode in Mode),
        (Mode.NONE, False, False, Mode.NONE),
        (Mode.PIECEWISE, False, False, Mode.PIECEWISE),
        (Mode.FULL, False, True, Mode.NONE),
        (Mode.FULL_DECODE_ONLY, False, True, Mode.NONE),
        (Mode.FULL_AND_PIECEWISE, False, True, Mode.PIECEWISE),
        (Mode.FULL, True, False, Mode.FULL_DECODE_ONLY),
        (Mode.FULL_DECODE_ONLY, True, False, Mode.FULL_DECODE_ONLY),
        (Mode.FULL_AND_PIECEWISE, True, False, Mode.FULL_AND_PIECEWISE),
        (Mode.PIECEWISE, True, False, Mode.PIECEWISE),
    ],
)
def test_what_attention_leaves_of_a_mode(mode, whole, mixed, expected):
    assert capturable_mode(mode, whole, mixed) is expected
