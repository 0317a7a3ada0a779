"""The Sampler layer: penalties against transformers and by definition, bias, log probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from atom.layers.sampler import Sampler, SamplingMetadata, apply_penalties_, gather_logprobs

VOCAB = 1000


@pytest.fixture
def logits():
    return torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def sampler():
    return Sampler()


def penalties(rows, prompts, outputs, presence=0.0, frequency=0.0, repetition=1.0, vocab_size=VOCAB):
    """Metadata of equal penalties for some rows with these prompts and outputs."""
    mask = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    counts = torch.zeros(len(rows), vocab_size, dtype=torch.int32)
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        mask[i, prompt] = True
        for token in output:
            counts[i, token] += 1

    def full(value):
        return torch.full((len(rows),), value)

    return {
        "penalty_rows": torch.tensor(rows),
        "prompt_mask": mask,
        "output_counts": counts,
        "presence_penalty": full(presence),
        "frequency_penalty": full(frequency),
        "repetition_penalty": full(repetition),
    }


def test_all_greedy_takes_the_largest(sampler, logits):
    before = logits.clone()
    output = sampler(logits, SamplingMetadata(all_greedy=True))
    assert torch.equal(output.token_ids, before.argmax(-1))
    assert torch.equal(logits, before)
    assert output.logprobs is None


def test_mixed_rows(sampler, logits):
    metadata = SamplingMetadata(
        all_greedy=False,
        temperature=torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]),
        top_k=torch.tensor([VOCAB, 1, VOCAB, 1, VOCAB], dtype=torch.int32),
        uniform=torch.full((5,), 0.999),
    )
    token_ids = sampler(logits, metadata).token_ids
    assert torch.equal(token_ids[:4], logits.argmax(-1)[:4])
    assert token_ids[4] > 900


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=20),
    tokens=st.lists(st.integers(0, 10**6), max_size=30),
    split=st.integers(0, 30),
    penalty=st.sampled_from([0.5, 1.0, 1.1, 2.0]),
)
def test_repetition_penalty_is_that_of_transformers(scores, tokens, split, penalty):
    """Over prompt and output together, wherever the border between them is."""
    tokens = [t % len(scores) for t in tokens]
    logits = torch.tensor([scores, scores])
    metadata = penalties([1], [tokens[:split]], [tokens[split:]], repetition=penalty, vocab_size=len(scores))
    adjusted = logits.clone()
    apply_penalties_(adjusted, SamplingMetadata(all_greedy=True, **metadata))
    ids = torch.tensor([tokens], dtype=torch.int64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[1:].clone()) if tokens else logits[1:]
    torch.testing.assert_close(adjusted[1:], expected, rtol=0, atol=0)
    assert torch.equal(adjusted[0], logits[0])


def test_presence_and_frequency_count_the_output_only(logits):
    prompts, outputs = [[1, 2, 3, 3], [7]], [[3, 4, 4, 4], []]
    metadata = penalties([4, 2], prompts, outputs, presence=0.5, frequency=0.25, repetition=1.5)
    expected = logits.clone().numpy()
    for token in (1, 2, 3, 4):
        expected[4, token] = expected[4, token] / 1.5 if expected[4, token] > 0 else expected[4, token] * 1.5
    expected[4, 3] -= 0.25 * 1 + 0.5
    expected[4, 4] -= 0.25 * 3 + 0.5
    expected[2, 7] = expected[2, 7] / 1.5 if expected[2, 7] > 0 else expected[2, 7] * 1.5
    apply_penalties_(logits, SamplingMetadata(all_greedy=True, **metadata))
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-6)


def test_penalties_of_several_rows_are_their_own(logits):
    metadata = penalties([0, 3], [[5], [6]], [[], []], repetition=2.0)
    metadata["repetition_penalty"] = torch.tensor([2.0, 4.0])
    logits[:, 5:7] = 8.0
    apply_penalties_(logits, SamplingMetadata(all_greedy=True, **metadata))
    assert logits[:, 5].tolist() == [4.0, 8.0, 8.0, 8.0, 8.0]
    assert logits[:, 6].tolist() == [8.0, 8.0, 8.0, 2.0, 8.0]


def test_dense_and_sparse_penalties_agree(logits):
    """A GPU computes densely what a CPU does for the tokens that were seen."""
    from atom.layers.sampler import _penalize

    metadata = penalties([0, 1, 2, 3, 4], [[9, 1]] * 5, [[4, 4, 8]] * 5, 0.3, 0.2, 1.3)
    counts, mask = metadata["output_counts"], metadata["prompt_mask"]
    values = [metadata[f"{name}_penalty"].unsqueeze(1) for name in ("presence", "frequency", "repetition")]
    dense = torch.where(mask | (counts > 0), _penalize(logits, counts, *values), logits)
    apply_penalties_(logits, SamplingMetadata(all_greedy=True, **metadata))
    assert torch.equal(logits, dense)


def test_sampled_distribution_with_penalties(sampler):
    """End to end: the share of every token over an even grid of random numbers."""
    rows = 4000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).expand(rows, -1).contiguous()
    one = logits[0].double().numpy().copy()
    for token in (0, 1, 2, 3):
        one[token] = one[token] / 1.4 if one[token] > 0 else one[token] * 1.4
    one[2] -= 0.6 + 0.3
    one[3] -= 2 * 0.6 + 0.3
    one[5] += 1.5
    one /= 0.8
    probability = np.exp(one) / np.exp(one).sum()
    metadata = SamplingMetadata(
        all_greedy=False,
        temperature=torch.full((rows,), 0.8),
        uniform=(torch.arange(rows) + 0.5) / rows,
        bias_rows=torch.arange(rows),
        bias_tokens=torch.full((rows,), 5),
        bias_values=torch.full((rows,), 1.5),
        **penalties(range(rows), [[0, 1, 2]] * rows, [[2, 3, 3]] * rows, 0.3, 0.6, 1.4, vocab_size=12),
    )
    share = np.bincount(sampler(logits, metadata).token_ids.numpy(), minlength=12) / rows
    np.testing.assert_allclose(share, probability, atol=2 / rows)


def test_bias_moves_and_forbids_tokens(sampler, logits):
    before = logits.clone()
    best = logits.argmax(-1)
    metadata = SamplingMetadata(
        all_greedy=True,
        bias_rows=torch.tensor([0, 1, 1, 2]),
        bias_tokens=torch.tensor([17, int(best[1]), int(best[1]), 18]),
        bias_values=torch.tensor([100.0, 5.0, -torch.inf, -100.0]),
    )
    token_ids = sampler(logits, metadata).token_ids
    assert token_ids[0] == 17
    # -inf wins over a bias of the same token.
    assert token_ids[1] == before[1].index_fill(0, best[1], -torch.inf).argmax()
    assert torch.equal(token_ids[2:], best[2:])


@pytest.mark.parametrize("num", [0, 1, 5, 40])
def test_logprobs_are_those_of_log_softmax(logits, num):
    logits = torch.cat([logits] * 3, dim=1)[:, : 2 * VOCAB + 7] + torch.arange(2 * VOCAB + 7) * 1e-4
    token_ids = torch.tensor([0, 5, 2000, 1234, int(logits[4].argmax())])
    ids, logprobs, ranks = gather_logprobs(logits, token_ids, num)
    reference = logits.log_softmax(-1)
    assert ids.shape == logprobs.shape == (5, 1 + num)
    assert torch.equal(ids[:, 0], token_ids)
    assert torch.equal(ids[:, 1:], reference.topk(num).indices)
    assert torch.equal(logprobs, reference.gather(1, ids))
    order = reference.argsort(descending=True)
    assert ranks.tolist() == [order[r].tolist().index(t) + 1 for r, t in enumerate(token_ids.tolist())]
    assert ranks[4] == 1


def test_logprobs_are_of_raw_logits(sampler, logits):
    before = logits.clone()
    metadata = SamplingMetadata(
        all_greedy=False,
        temperature=torch.full((5,), 0.5),
        top_k=torch.full((5,), 1, dtype=torch.int32),
        uniform=torch.zeros(5),
        bias_rows=torch.arange(5),
        bias_tokens=torch.full((5,), 3),
        bias_values=torch.full((5,), 200.0),
        num_logprobs=2,
        **penalties([0, 1], [[3], [3]], [[], []], repetition=1.1),
    )
    output = sampler(logits, metadata)
    assert output.token_ids.tolist() == [3] * 5
    assert torch.equal(logits, before)
    assert torch.equal(output.logprobs[:, 0], before.log_softmax(-1)[:, 3])
    assert torch.equal(output.ranks, (before > before[:, 3:4]).sum(-1) + 1)
    assert torch.equal(output.logprob_token_ids[:, 1:], before.topk(2).indices)


def test_only_rows_that_ask_get_logprobs(sampler, logits):
    everyone = sampler(logits, SamplingMetadata(all_greedy=True, num_logprobs=3))
    some = sampler(logits, SamplingMetadata(all_greedy=True, num_logprobs=3, logprob_rows=torch.tensor([1, 4])))
    assert some.logprobs.shape == (5, 4)
    for name in ("logprob_token_ids", "logprobs", "ranks"):
        assert torch.equal(getattr(some, name)[[1, 4]], getattr(everyone, name)[[1, 4]])


def test_more_logprobs_than_tokens():
    ids, logprobs, ranks = gather_logprobs(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]), 20)
    assert ids.tolist() == [[2, 1, 2, 0]]
    assert ranks.tolist() == [2]
    assert logprobs[0, 0] == logprobs[0, 2]
