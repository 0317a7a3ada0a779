"""Prompts and parameters of every kind, right and wrong."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atom.model_engine.input_processor import InputProcessor
from atom.sampling_params import SamplingParams
from atom.utils.errors import RequestError

WORDS = ["<unk>", "<end>", "a", "b", "c", "longest"]


def tokenizer():
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="module")
def processor():
    return InputProcessor(tokenizer(), vocab_size=10, max_model_len=8, end_token_ids=[1, 9])


def one(processor, prompt, **params):
    request = processor.process("r", prompt, SamplingParams(**params))
    (child,) = request.children
    return request, child


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a b c", "a b c"),
        ({"prompt": "a b c"}, "a b c"),
        ({"prompt": "shown", "prompt_token_ids": [2, 3, 4]}, "shown"),
        ({"prompt_token_ids": [2, 3, 4]}, None),
        ([2, 3, 4], None),
        ((2, 3, 4), None),
        (range(2, 5), None),
        (np.array([2, 3, 4]), None),
        ([np.int32(2), 3, 4], None),
    ],
)
def test_every_form_of_a_prompt(processor, prompt, text):
    request, child = one(processor, prompt)
    assert request.prompt == text
    assert request.prompt_token_ids == child.prompt_token_ids == [2, 3, 4]
    assert all(type(i) is int for i in child.prompt_token_ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ({}, "prompt must be"),
        ({"promt": "a"}, "did you mean 'prompt'"),
        ({"prompt": 3}, "prompt must be str, not int"),
        (None, "not NoneType"),
        (7, "not int"),
        (b"a", "not bytes"),
        ([2, "a"], "one is 'a'"),
        ([2, True], "one is True"),
        ([2, 1.5], "one is 1.5"),
        ([[2]], r"one is \[2\]"),
        ([2, 10], "token id 10 is not in the vocabulary"),
        ([2, -1], "token id -1 is not in the vocabulary"),
        ([2] * 8, "has 8 tokens, which with one to generate is more than max_model_len=8 allows"),
        ("a " * 8, "has 8 tokens"),
        ("a" * 100, "has 100 characters"),
        ("a \ud800", "surrogates"),
    ],
)
def test_a_bad_prompt_is_named(processor, prompt, message):
    with pytest.raises(RequestError, match=message) as caught:
        one(processor, prompt)
    assert caught.value.param == "prompt" or "prompt" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [10]}, "stop_token_ids: token id 10"),
        ({"logit_bias": {99: 1.0}}, "logit_bias: token id 99"),
        ({"logprobs": 11}, "logprobs=11 is more than the vocabulary"),
    ],
)
def test_parameters_are_held_against_the_vocabulary(processor, params, message):
    with pytest.raises(RequestError, match=message):
        one(processor, [2], **params)


@pytest.mark.parametrize("bad", [{"request_id": 3}, {"priority": "high"}, {"priority": True}, {"cache_salt": None}])
def test_wrong_types(processor, bad):
    arguments = {"request_id": "r", "priority": 0, "cache_salt": ""} | bad
    with pytest.raises(RequestError, match=next(iter(bad))):
        processor.process(arguments.pop("request_id"), [2], SamplingParams(), **arguments)
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams, not dict"):
        processor.process("r", [2], {"temperature": 1})


def test_text_needs_a_tokenizer():
    processor = InputProcessor(None, vocab_size=10, max_model_len=8)
    assert one(processor, [2])[1].prompt_token_ids == [2]
    with pytest.raises(RequestError, match="no tokenizer"):
        one(processor, "a")


def test_lengths_shrink_to_the_room_left(processor):
    _, child = one(processor, [2] * 5, max_tokens=50, min_tokens=40)
    assert (child.sampling_params.max_tokens, child.sampling_params.min_tokens) == (3, 3)
    assert one(processor, [2], max_tokens=2)[1].sampling_params.max_tokens == 2


def test_end_tokens(processor):
    assert one(processor, [2])[1].sampling_params.stop_token_ids == [1, 9]
    assert one(processor, [2], stop_token_ids=[4, 9])[1].sampling_params.stop_token_ids == [4, 9, 1]
    assert one(processor, [2], stop_token_ids=[4], ignore_eos=True)[1].sampling_params.stop_token_ids == [4]


def test_stop_strings_stay_in_the_front_end(processor):
    request, child = one(processor, [2], stop_strings=["x"])
    assert request.sampling_params.stop_strings == ["x"]
    assert child.sampling_params.stop_strings is None


def test_n_answers_are_requests_with_seeds_of_their_own(processor):
    request = processor.process(
        "r", [2], SamplingParams(n=100, seed=-(2**63), prompt_logprobs=1), priority=3, cache_salt="s"
    )
    children = request.children
    assert [c.request_id for c in children] == [f"r_{i}" for i in range(100)]
    assert {(c.sampling_params.n, c.priority, c.cache_salt) for c in children} == {(1, 3, "s")}
    seeds = [c.sampling_params.seed for c in children]
    assert len(set(seeds)) == 100
    assert seeds[0] == -(2**63)  # so that one answer is the first of several
    assert [c.sampling_params.prompt_logprobs for c in children] == [1] + [None] * 99
    again = processor.process("other", [3], SamplingParams(n=100, seed=-(2**63)))
    assert [c.sampling_params.seed for c in again.children] == seeds


def test_missing_seeds_come_from_the_engines_seed():
    def seeds(seed):
        processor = InputProcessor(None, vocab_size=10, max_model_len=8, seed=seed)
        return [one(processor, [2])[1].sampling_params.seed for _ in range(3)]

    assert seeds(5) == seeds(5)
    assert len(set(seeds(5))) == 3
    assert seeds(5) != seeds(6)
    assert seeds(None) != seeds(None)


def test_assigned_fields_are_checked(processor):
    params = SamplingParams()
    params.temperature = -1
    with pytest.raises(RequestError, match="temperature"):
        processor.process("r", [2], params)
