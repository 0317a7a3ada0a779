"""SamplingState: what it builds, when it reuses it, and how rows come and go."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from atom.layers.sampler import Sampler, SamplerOutput
from atom.model_engine.protocol import TokenLogprobs
from atom.model_engine.sampling import SamplingState, to_token_logprobs, worst_case_metadata
from atom.sampling_params import SamplingParams
from atom.utils.rng import uniform

VOCAB = 300
CPU = torch.device("cpu")


@pytest.fixture
def state():
    return SamplingState(8, VOCAB, CPU)


def add(state, row, prompt=(1, 2), output=(), stops=(), **params):
    params.setdefault("seed", 0)
    state.add(row, SamplingParams(**params), prompt, output, stops)


def test_plain_greedy_is_one_constant(state):
    add(state, 0, temperature=0)
    add(state, 5, temperature=0, seed=None)
    metadata = state.build([5, 0])
    assert metadata.all_greedy
    assert metadata.temperature is None
    state.append([5, 0], [3, 4])
    assert state.build(np.array([0])) is metadata
    add(state, 2, temperature=1.0)
    assert state.build([0, 5]).all_greedy  # the other row doesn't take part
    assert not state.build([0, 2]).all_greedy


def test_fields_follow_the_order_of_rows(state):
    add(state, 0, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125)
    add(state, 1, temperature=0, top_k=3, top_p=0.9)
    add(state, 7, temperature=2.0)
    metadata = state.build([7, 1, 0])
    assert metadata.temperature.tolist() == [2.0, 0.0, 0.5]
    assert metadata.top_k.tolist() == [VOCAB, VOCAB, 3]  # greedy rows need no filter
    assert metadata.top_p.tolist() == [1.0, 1.0, 0.25]
    assert metadata.min_p.tolist() == [0.0, 0.0, 0.125]
    assert [metadata.temperature.dtype, metadata.top_k.dtype] == [torch.float32, torch.int32]
    without = state.build(np.array([1, 7]))
    assert without.top_k is without.top_p is without.min_p is without.penalty_rows is without.bias_rows is None
    assert without.num_logprobs == -1


@pytest.mark.parametrize("top_k", [-1, 0, VOCAB, VOCAB + 1, 10**9])
def test_top_k_that_filters_nothing_is_off(state, top_k):
    add(state, 0, temperature=1.0, top_k=top_k)
    assert state.build([0]).top_k is None


def test_random_numbers_made_ahead_are_of_the_position_reached(state):
    seeds = np.array([5, 6, 7], dtype=np.uint64)
    for row in range(3):
        add(state, row, seed=5 + row)
    positions = np.zeros(3, dtype=np.int64)
    for step in range(50):
        if step in (7, 30):  # one gets a token in a step of its own
            state.append([1], [4])
            positions[1] += 1
        for _ in range(2):  # asking changes nothing
            np.testing.assert_array_equal(state.build([0, 1, 2]).uniform.numpy(), uniform(seeds, positions))
        state.append([0, 1, 2], [4, 4, 4])
        positions += 1


def test_random_numbers_are_of_seed_and_position(state):
    add(state, 3, seed=11)
    add(state, 1, seed=-5, output=[9, 9, 9])
    seeds = np.array([-5 % 2**64, 11], dtype=np.uint64)
    for step in range(4):
        metadata = state.build([1, 3])
        np.testing.assert_array_equal(metadata.uniform.numpy(), uniform(seeds, [3 + step, step]))
        state.append([1, 3], [0, 0])
    state.append([3], [0])
    np.testing.assert_array_equal(state.build([3]).uniform.numpy(), uniform(seeds[1:], [5]))


def test_static_tensors_are_reused_until_something_changes(state):
    add(state, 0, temperature=0.7)
    add(state, 1, temperature=0.8)
    first = state.build([0, 1]).temperature
    state.append([0, 1], [1, 1])
    assert state.build(np.array([0, 1])).temperature is first
    assert state.build([1, 0]).temperature.tolist() == pytest.approx([0.8, 0.7])
    state.remove(1)
    add(state, 1, temperature=0.9)
    assert state.build([0, 1]).temperature.tolist() == pytest.approx([0.7, 0.9])


def test_a_freed_row_leaves_nothing_behind(state):
    add(
        state, 0, stops=[4], temperature=0.7, top_k=2, top_p=0.5, min_p=0.1, min_tokens=9, logprobs=3,
        presence_penalty=1.0, logit_bias={5: 1.0},
    )  # fmt: skip
    state.build([0])
    state.remove(0)
    add(state, 0, temperature=0, seed=None)
    metadata = state.build([0])
    assert metadata == type(metadata)(all_greedy=True)
    with pytest.raises(AssertionError):
        add(state, 0)


def test_logit_bias(state):
    add(state, 0, temperature=0)
    add(state, 1, temperature=0, logit_bias={7: -3.0, 9: 2.5})
    add(state, 2, temperature=1.0, logit_bias={8: 1.0})
    metadata = state.build([2, 0, 1])
    assert metadata.bias_rows.tolist() == [0, 2, 2]
    assert metadata.bias_tokens.tolist() == [8, 7, 9]
    assert metadata.bias_values.tolist() == [1.0, -3.0, 2.5]
    assert state.build([0]).bias_rows is None
    assert state.build([1]).all_greedy
    assert [state.build([row]).only_likeliest for row in range(3)] == [True, False, False]


def test_logits_are_needed_for_more_than_the_likeliest_token(state):
    add(state, 0, temperature=0)
    add(state, 1, temperature=0, logprobs=0)
    add(state, 2, temperature=0, frequency_penalty=0.5)
    assert [state.build([row]).only_likeliest for row in range(3)] == [True, False, False]
    assert not state.build([0, 1]).only_likeliest
    masked = replace(state.build([0]), mask_rows=torch.tensor([0]), token_masks=torch.ones(1, VOCAB // 8 + 1).byte())
    assert not masked.only_likeliest


def test_min_tokens_suppresses_stops_until_reached(state):
    # The same id twice, ids that no token has, and a model without an end token (-1).
    add(state, 0, temperature=0, stops=[5, 4, 5, -1, VOCAB], min_tokens=2)
    add(state, 1, temperature=0, stops=[6], min_tokens=0)
    logits = torch.zeros(2, VOCAB)
    logits[:, 4:7] = torch.tensor([2.0, 3.0, 4.0])
    logits[0, 6] = 1.0
    sampler, drawn = Sampler(), []
    for _ in range(4):
        drawn.append(sampler(logits.clone(), state.build([0, 1])).token_ids.tolist())
        state.append([0, 1], drawn[-1])
    assert drawn == [[6, 6], [6, 6], [5, 6], [5, 6]]
    assert state.build([0, 1]).bias_rows is None


def test_min_tokens_of_a_resumed_request(state):
    add(state, 0, temperature=0, stops=[5], min_tokens=3, output=[1, 1])
    assert state.build([0]).bias_tokens.tolist() == [5]
    state.append([0], [1])
    assert state.build([0]).bias_tokens is None
    add(state, 1, temperature=0, stops=[5], min_tokens=3, output=[1, 1, 1])
    assert state.build([0, 1]).bias_tokens is None


def test_each_row_reaches_its_own_min_tokens(state):
    add(state, 0, temperature=0, stops=[5], min_tokens=2)
    add(state, 1, temperature=0.5, stops=[6], min_tokens=20, output=[1])  # after more steps than are made ahead
    rows, suppressed = np.array([0, 1]), []
    for _ in range(20):
        at = state.build(rows).bias_rows
        suppressed.append([] if at is None else at.tolist())
        state.append(rows, [1, 1])
    assert suppressed == [[0, 1]] * 2 + [[1]] * 17 + [[]]


def test_penalty_state_is_counted_and_freed(state):
    add(state, 0, temperature=0)
    add(state, 4, temperature=0, prompt=[1, 2, 1], output=[2, 7, 7], frequency_penalty=0.5)
    add(state, 2, temperature=0, prompt=[], presence_penalty=-1.0, repetition_penalty=1.5)
    state.append([0, 2, 4], [9, 8, 7])
    metadata = state.build([0, 4, 2])
    assert metadata.all_greedy
    assert metadata.penalty_rows.tolist() == [1, 2]
    assert metadata.frequency_penalty.tolist() == [0.5, 0.0]
    assert metadata.presence_penalty.tolist() == [0.0, -1.0]
    assert metadata.repetition_penalty.tolist() == [1.0, 1.5]
    assert metadata.prompt_mask.shape == metadata.output_counts.shape == (2, VOCAB)
    assert metadata.prompt_mask[0].nonzero().flatten().tolist() == [1, 2]
    assert not metadata.prompt_mask[1].any()
    assert {t: int(metadata.output_counts[0, t]) for t in metadata.output_counts[0].nonzero().flatten().tolist()} == {
        2: 1,
        7: 3,
    }
    assert metadata.output_counts[1].nonzero().flatten().tolist() == [8]
    state.remove(4)
    state.remove(2)
    assert state.build([0]).penalty_rows is None


@pytest.mark.parametrize("as_tensor", [False, True])
def test_penalties_follow_a_random_life(as_tensor):
    """Rows come, go and sample in changing order; counts always equal those of each row's own output."""
    rng = random.Random(3)
    state = SamplingState(6, VOCAB, CPU)
    outputs, penalized, prompts = {}, {}, {}
    for _ in range(400):
        action = rng.random()
        if action < 0.15 and len(outputs) < 6:
            row = rng.choice([r for r in range(6) if r not in outputs])
            penalized[row], prompts[row] = rng.random() < 0.6, [rng.randrange(VOCAB) for _ in range(3)]
            outputs[row] = [rng.randrange(5) for _ in range(rng.randrange(3))]
            add(state, row, prompts[row], outputs[row], frequency_penalty=float(penalized[row]), seed=row)
        elif action < 0.25 and outputs:
            row = rng.choice(list(outputs))
            state.remove(row)
            del outputs[row]
        elif outputs:
            rows = rng.sample(list(outputs), rng.randint(1, len(outputs))) if rng.random() < 0.5 else list(outputs)
            metadata = state.build(rows)
            expected = [i for i, row in enumerate(rows) if penalized[row]]
            assert (metadata.penalty_rows.tolist() if metadata.penalty_rows is not None else []) == expected
            for i, at in enumerate(expected):
                counts = np.bincount(outputs[rows[at]], minlength=VOCAB)
                np.testing.assert_array_equal(metadata.output_counts[i].numpy(), counts)
                assert set(metadata.prompt_mask[i].nonzero().flatten().tolist()) == set(prompts[rows[at]])
            positions = [len(outputs[row]) for row in rows]
            np.testing.assert_array_equal(metadata.uniform.numpy(), uniform(rows, positions))
            tokens = [rng.randrange(5) for _ in rows]
            state.append(rows, torch.tensor(tokens) if as_tensor else tokens)
            for row, token in zip(rows, tokens, strict=True):
                outputs[row].append(token)


def test_state_works_in_and_out_of_inference_mode(state):
    with torch.inference_mode():
        add(state, 0, temperature=0, frequency_penalty=1.0)
    state.append([0], torch.tensor([3]))
    with torch.inference_mode():
        state.append([0], torch.tensor([3]))
        assert state.build([0]).output_counts[0, 3] == 2
        state.remove(0)
        add(state, 0, temperature=0, frequency_penalty=1.0)
    state.append([0], [4])
    assert state.build([0]).output_counts.sum() == 1


def test_tokens_do_not_depend_on_the_batch():
    """A request's tokens alone, and among others that come and go around it."""
    requests = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "seed": 2, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "seed": 3, "min_p": 0.05, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1, "logit_bias": {4: 2.0}, "logprobs": 2},
        {"temperature": 1.5, "seed": 9, "top_p": 0.7, "min_tokens": 6},
    ]
    model = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)) * 2  # last token -> logits
    sampler = Sampler()

    def run(schedule):
        """schedule: for every step, the requests that take part, in order."""
        state = SamplingState(len(requests), VOCAB, CPU)
        tokens = {i: [] for i in range(len(requests))}
        for step in schedule:
            for i in step:
                if not tokens[i]:
                    add(state, i, [i], stops=[0], **requests[i])
            logits = torch.stack([model[tokens[i][-1] if tokens[i] else i] for i in step])
            drawn = sampler(logits, state.build(step)).token_ids
            state.append(step, drawn)
            for i, token in zip(step, drawn.tolist(), strict=True):
                tokens[i].append(token)
        return tokens

    rng = random.Random(0)
    alone = run([[i] for i in range(len(requests)) for _ in range(12)])
    mixed_schedule = [rng.sample(range(len(requests)), rng.randint(1, len(requests))) for _ in range(40)]
    mixed = run(mixed_schedule)
    for i in range(len(requests)):
        shared = min(len(alone[i]), len(mixed[i]))
        assert shared >= 10
        assert alone[i][:shared] == mixed[i][:shared]
    assert len({tuple(tokens[:10]) for tokens in alone.values()}) == len(requests)


def test_logprobs_only_for_rows_that_ask(state):
    add(state, 0, temperature=0)
    add(state, 1, temperature=0, logprobs=0)
    add(state, 2, temperature=1.0, logprobs=4)
    assert state.build([0]).num_logprobs == -1
    assert state.build([0, 1]).num_logprobs == 0
    metadata = state.build([2, 0, 1])
    assert metadata.num_logprobs == 4
    assert metadata.logprob_rows.tolist() == [0, 2]
    assert state.build([1, 2]).logprob_rows is None


def test_to_token_logprobs_honors_each_rows_number():
    output = SamplerOutput(
        token_ids=torch.tensor([4, 5, 6]),
        logprob_token_ids=torch.tensor([[4, 1, 2], [5, 1, 3], [6, 6, 2]]),
        logprobs=torch.tensor([[-3.0, -1.0, -2.0], [-4.0, -0.5, -1.5], [-0.25, -0.25, -8.0]]),
        ranks=torch.tensor([9, 8, 1]),
    )
    assert to_token_logprobs(output, [1, None, 0]) == [
        TokenLogprobs(token_ids=[4, 1], logprobs=[-3.0, -1.0], rank=9),
        None,
        TokenLogprobs(token_ids=[6], logprobs=[-0.25], rank=1),
    ]
    assert to_token_logprobs(SamplerOutput(token_ids=torch.tensor([1, 2])), [None, None]) == [None, None]


def test_worst_case_metadata_samples(state):
    output = Sampler()(torch.randn(4, VOCAB), worst_case_metadata(4, CPU))
    assert output.token_ids.shape == (4,)
    assert output.logprobs.shape == (4, 2)
