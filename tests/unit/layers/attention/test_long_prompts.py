"""Parts of long prompts may skip the paged kernel: the result is the same, and few shapes come up."""

import numpy as np
import pytest
import torch
from attention_steps import DIM, HEADS, KV_HEADS, attend_on_cpu, compare_step, prepare_step

pytest.importorskip("triton")

from atom.layers.attention import long_prompts
from atom.layers.attention.backends import triton
from atom.layers.attention.backends.torch import TorchAttentionBackend
from atom.layers.attention.base import AttentionSpec, LongPart
from atom.layers.attention.long_prompts import LongPrompts

NUM_BLOCKS = 60
SMALL = LongPrompts(shortest=12, step=8, long_from=40, long_step=16, piece=32)
# (cached tokens, new ones) of each request in a step
STEPS = {
    "one": [(0, 24)],
    "odd": [(0, 29)],
    "several": [(0, 13), (0, 57), (0, 40)],
    "mixed": [(8, 1), (0, 57), (20, 6), (0, 3), (0, 17), (0, 1), (0, 12)],
    "after cached ones": [(64, 64), (96, 32)],
    "odd after odd": [(40, 91), (33, 45), (5, 50)],
    "everything": [(0, 33), (70, 75), (50, 2), (30, 1), (0, 5), (31, 40), (32, 37), (119, 1)],
    "nothing long": [(0, 11), (20, 43), (7, 1)],
}


def prepare(lengths, block_size, cut):
    return prepare_step(lengths, block_size, NUM_BLOCKS, long_prompts=cut)


# A cut depends on no block size: each kind of step with the one that no cut falls on, the interpreter being slow.
CASES = [(name, 48, False) for name in STEPS]
CASES += [("mixed", 16, True), ("after cached ones", 16, True), ("everything", 64, False)]


@pytest.mark.parametrize(("name", "block_size", "packed"), CASES)
def test_a_cut_step_equals_the_reference(name, packed, block_size, monkeypatch):
    monkeypatch.setattr(long_prompts, "attend_with_lse", attend_on_cpu)
    spec = AttentionSpec(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        scale=0.3,
        dtype=torch.float32,
        block_size=block_size,
        kv_cache_dtype=torch.float32,
    )
    ours = triton.TritonAttentionBackend(spec)
    assert ours.long_prompts is None
    ours.long_prompts = SMALL
    step = prepare(STEPS[name], block_size, SMALL)
    compare_step(ours, TorchAttentionBackend(spec), step, NUM_BLOCKS, packed)
    metadata = step.metadata
    # As much as the rule says goes another way, and the paged kernel doesn't attend from it as well.
    expected = sorted(found for computed, new in STEPS[name] if (found := SMALL.find(new, computed)[1]))
    assert sorted(part.length for part in metadata.long_parts) == expected
    for part in metadata.long_parts:
        if metadata.rest is not None and part.start < len(metadata.rest.slot_mapping):
            segment = metadata.rest.query_start_loc.tolist().index(part.start)
            assert metadata.rest.seq_lens[segment] == 0
            assert metadata.rest.query_start_loc[segment + 1] == part.start + part.length


def test_what_a_step_is_cut_into():
    metadata = prepare([(0, 29), (8, 1), (40, 91), (0, 24)], 16, SMALL).metadata
    # In the batch's order: the decode, the prompts of 24 and 29 tokens, the chunk.
    assert metadata.long_parts == (LongPart(1, 1, 24, 0), LongPart(2, 25, 24, 0), LongPart(3, 78, 64, 64))
    rest = metadata.rest
    assert rest.query_start_loc.tolist() == [0, 1, 25, 49, 54, 78, 142, 145]
    assert rest.seq_lens.tolist() == [9, 0, 0, 29, 64, 0, 131]
    assert rest.block_table.tolist() == metadata.block_table[[0, 1, 2, 2, 3, 3, 3]].tolist()
    assert rest.slot_mapping.tolist() == metadata.slot_mapping.tolist()
    assert (rest.num_decodes, rest.max_query_len, rest.max_seq_len, rest.long_parts) == (1, 64, 131, ())


def test_a_rest_ends_where_only_long_parts_follow():
    metadata = prepare([(0, 24), (8, 1), (0, 16)], 16, SMALL).metadata
    assert [part.start for part in metadata.long_parts] == [1, 17]
    assert metadata.rest.query_start_loc.tolist() == [0, 1]
    assert len(metadata.rest.slot_mapping) == 1
    assert prepare([(0, 24)], 16, SMALL).metadata.rest is None


def test_nothing_is_cut_for_backends_that_did_not_ask():
    metadata = prepare(STEPS["everything"], 16, None).metadata
    assert (metadata.long_parts, metadata.rest) == ((), None)


@pytest.mark.parametrize(
    ("length", "context", "expected"),
    [
        (2047, 0, (0, 0)),
        (2048, 0, (0, 2048)),
        (2559, 0, (0, 2048)),
        (4095, 0, (0, 3584)),
        (5119, 0, (0, 4096)),
        (16383, 0, (0, 15360)),
        (16384, 16384, (0, 16384)),
        (16384, 16380, (4, 15360)),
        (16384, 8191, (1, 15360)),
        (16384, 500, (7692, 8192)),
        (8191, 8192, (0, 0)),
        (9000, 7300, (0, 0)),
        (16384, 8193, (8191, 8192)),
        (16384, 9000, (7384, 8192)),
        (16000, 8193, (0, 0)),
    ],
)
def test_the_part_of_a_chunk(length, context, expected):
    assert LongPrompts().find(length, context) == expected


def test_shapes_are_few_and_most_of_a_prompt_is_in_its_part():
    rule = LongPrompts()
    fresh = {length: rule.find(length, 0)[1] for length in range(1, 16385)}
    assert len(set(fresh.values()) - {0}) == 4096 // 512 - 4 + (16384 - 4096) // 1024 + 1
    assert all(part > length - min(1024, length / 2) for length, part in fresh.items() if length >= 2048)
    for context in np.random.default_rng(0).integers(1, 131072, 500).tolist():
        skipped, length = rule.find(16384, context)
        if length:
            assert (context + skipped) % rule.piece == 0
            assert length in range(8192, 16385, 1024)
            assert 0 <= 16384 - skipped - length < 1024
        else:
            assert context % 8192 != 0
