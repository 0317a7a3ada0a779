"""Answers of a given form, with the embedded model: always of that form, and no other request is touched."""

import json
import re

import pytest

from atom import LLM, SamplingParams

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = "Describe a person. "


@pytest.fixture(scope="module")
def llm():
    with LLM(model="smollm2", dtype="float32", device="cpu", max_model_len=512, max_num_seqs=8) as llm:
        yield llm


def generate(llm, params, prompt=PROMPT):
    prompts = [prompt] * len(params) if isinstance(params, list) else [prompt]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def sampled(structure, seed=0, **options):
    options = {"temperature": 1.0, "max_tokens": 200, "seed": seed} | options
    return SamplingParams(structured_output=structure, **options)


def test_json_follows_its_schema_whatever_is_sampled(llm):
    answers = generate(llm, [sampled({"json": PERSON}, seed) for seed in range(8)])
    for answer in answers:
        person = json.loads(answer.text)
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)
        assert len(person["name"]) <= 20
        assert answer.finish_reason == "stop"
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": r"[A-Z][a-z]{2,8} \d{4}"}, r"[A-Z][a-z]{2,8} \d{4}"),
        ({"choice": ["red", 'a "quoted" one', "grün"]}, r'red|a "quoted" one|grün'),
        ({"grammar": 'root ::= ("yes" | "no") ", " [a-z]+ "."'}, r"(yes|no), [a-z]+\."),
        ({"json_object": True}, r"(?s)\{.*\}"),
        ({"choice": ["red", "blue"], "after": "."}, r"(?s)[^.]*\.\s*(red|blue)"),
    ],
    ids=str,
)
def test_other_kinds(llm, structure, pattern):
    for answer in generate(llm, [sampled(structure, seed, temperature=0.7) for seed in range(3)]):
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.text)
        else:
            assert "json_object" in structure or "after" in structure or "grammar" in structure


def test_the_others_of_the_batch_get_the_same_tokens_as_alone(llm):
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    alone = generate(llm, [plain])[0].token_ids
    together = generate(llm, [sampled({"json": PERSON}), plain, sampled({"choice": ["x", "y"]}), plain])
    assert together[1].token_ids == alone
    assert together[3].token_ids == alone
    assert together[2].text in ("x", "y")


def test_an_answer_is_the_same_alone_in_a_batch_and_after_preemption(llm):
    alone = [generate(llm, [sampled({"json": PERSON}, seed)])[0].token_ids for seed in range(4)]
    assert [a.token_ids for a in generate(llm, [sampled({"json": PERSON}, seed) for seed in range(4)])] == alone
    small = {"num_kvcache_blocks": 4, "max_model_len": 64, "max_num_seqs": 4, "enable_prefix_caching": False}
    with LLM(model="smollm2", dtype="float32", device="cpu", **small) as tight:
        params = [sampled({"json": PERSON}, seed, max_tokens=50) for seed in range(4)]
        answers = generate(tight, params)
        assert tight.engine.stats()["preemptions"] > 0
    assert [a.token_ids for a in answers] == [tokens[:50] for tokens in alone]


def test_end_tokens_ignored_still_end_a_complete_answer(llm):
    answer = generate(llm, [sampled({"regex": "[ab]{3,5}"}, ignore_eos=True)])[0]
    assert re.fullmatch("[ab]{5}", answer.text)
    assert answer.finish_reason == "stop"


def test_log_probabilities_and_n(llm):
    params = sampled({"choice": ["red", "blue"]}, n=3, logprobs=2)
    output = llm.generate([PROMPT], params, use_tqdm=False)[0]
    assert {o.text for o in output.outputs} <= {"red", "blue"}
    assert all(len(o.logprobs) == len(o.token_ids) for o in output.outputs)


def test_a_wrong_structure_is_refused_alone(llm):
    plain = SamplingParams(temperature=0, max_tokens=2)
    outputs = llm.generate([PROMPT] * 2, [sampled({"regex": "(a"}), plain], use_tqdm=False)
    assert "structured_output.regex" in outputs[0].error
    assert outputs[1].error is None


@pytest.mark.parametrize("regex", ["((a{1000}){1000}){1000}", ".*" * 2000])
def test_too_complex_a_structure_fails_alone(llm, regex):
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    alone = generate(llm, [plain])[0].token_ids
    outputs = llm.generate([PROMPT] * 2, [SamplingParams(structured_output={"regex": regex}), plain], use_tqdm=False)
    assert outputs[0].error_param == "structured_output"
    assert outputs[1].outputs[0].token_ids == alone
