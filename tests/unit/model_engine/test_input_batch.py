import torch

from atom.model_engine.input_batch import InputBatch
from atom.model_engine.protocol import NewRequest, ScheduledBatch
from atom.sampling_params import SamplingParams


def new_request(name, tokens, blocks, computed=0, num_prompt=None):
    return NewRequest(
        request_id=name,
        token_ids=tokens,
        num_prompt_tokens=num_prompt or len(tokens),
        sampling_params=SamplingParams(),
        block_ids=blocks,
        num_computed_tokens=computed,
    )


def batch_of(**counts):
    return ScheduledBatch(
        new_requests=[],
        new_block_ids={},
        num_scheduled_tokens=counts,
        removed_request_ids=[],
        total_tokens=sum(counts.values()),
    )


def make_batch(block_size=4):
    return InputBatch(4, 32, block_size, 100, torch.device("cpu"))


def test_a_mixed_step_puts_decodes_first_and_finds_every_slot():
    batch = make_batch()
    batch.add(new_request("prompt", [10, 11, 12, 13, 14, 15], [5, 2], computed=1))
    batch.add(new_request("decode", [20, 21, 22], [7], computed=2, num_prompt=2))
    step = batch.prepare(batch_of(prompt=4, decode=1))
    meta = step.metadata
    assert [batch.request_ids[r] for r in step.rows] == ["decode", "prompt"]
    assert step.input_ids.tolist() == [22, 11, 12, 13, 14]
    assert step.positions.tolist() == [2, 1, 2, 3, 4]
    assert meta.slot_mapping.tolist() == [7 * 4 + 2, 5 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 2 * 4 + 0]
    assert meta.query_start_loc.tolist() == [0, 1, 5]
    assert meta.seq_lens.tolist() == [3, 5]
    assert meta.block_table.tolist() == [[7, 0], [5, 2]]
    assert (meta.num_decodes, meta.max_query_len, meta.max_seq_len) == (1, 4, 5)
    # The prompt has a token left, so only the decode samples.
    assert [batch.request_ids[r] for r in step.sampled_rows] == ["decode"]
    assert step.logits_indices.tolist() == [0]


def test_the_longest_come_last():
    batch = make_batch()
    batch.add(new_request("long", [1, 2, 3, 4, 5], [0, 1]))
    batch.add(new_request("chunk", [6, 7, 8], [2], computed=1))
    batch.add(new_request("short", [9, 10], [3]))
    batch.add(new_request("decode", [11, 12], [4], computed=1))
    step = batch.prepare(batch_of(long=5, chunk=2, short=2, decode=1))
    assert [batch.request_ids[r] for r in step.rows] == ["decode", "chunk", "short", "long"]
    assert step.metadata.query_start_loc.tolist() == [0, 1, 3, 5, 10]


def test_commit_advances_and_the_sampled_token_is_the_next_input():
    batch = make_batch()
    batch.add(new_request("a", [1, 2, 3], [0]))
    step = batch.prepare(batch_of(a=3))
    batch.advance(step, torch.tensor([42]))
    step = batch.prepare(batch_of(a=1))
    assert step.input_ids.tolist() == [42]
    assert step.positions.tolist() == [3]


def test_a_sampled_token_is_not_given_to_the_rows_next_request():
    batch = make_batch()
    batch.add(new_request("a", [1, 2, 3], [0]))
    batch.advance(batch.prepare(batch_of(a=3)), torch.tensor([42]))
    batch.remove("a")
    batch.add(new_request("b", [7, 8], [1]))
    assert batch.prepare(batch_of(b=2)).input_ids.tolist() == [7, 8]


def test_a_mixed_step_has_prompt_tokens_and_sampled_ones():
    batch = make_batch()
    batch.add(new_request("a", [1, 2, 3], [0]))
    batch.advance(batch.prepare(batch_of(a=3)), torch.tensor([42]))
    batch.add(new_request("b", [7, 8, 9], [1]))
    assert batch.prepare(batch_of(a=1, b=3)).input_ids.tolist() == [42, 7, 8, 9]


def test_rows_are_reused_without_leaking_the_earlier_request():
    batch = make_batch()
    row = batch.add(new_request("a", [1] * 9, [3, 4, 5]))
    assert batch.remove("a") == row
    assert batch.add(new_request("b", [2, 2], [6])) == row
    step = batch.prepare(batch_of(b=2))
    assert step.input_ids.tolist() == [2, 2]
    assert step.metadata.block_table.tolist() == [[6]]


def test_blocks_are_appended_in_order():
    batch = make_batch(block_size=1)
    row = batch.add(new_request("a", [1, 2], [9, 8]))
    batch.append_blocks(row, [4])
    assert batch.block_table[row, :3].tolist() == [9, 8, 4]
