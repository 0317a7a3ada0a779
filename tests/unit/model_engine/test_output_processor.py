"""Steps of the engine to users' outputs, with a byte-level vocabulary where token i is the byte i."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from atom.model_engine.detokenizer import DetokenizerFactory, _byte_alphabet
from atom.model_engine.input_processor import InputProcessor
from atom.model_engine.output_processor import OutputKind, OutputProcessor
from atom.model_engine.protocol import EngineOutput, StepOutputs, TokenLogprobs
from atom.sampling_params import SamplingParams

END = 256


def byte_tokenizer():
    vocab = _byte_alphabet() | {"<end>": END}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


DETOKENIZERS = DetokenizerFactory(byte_tokenizer())


class Harness:
    def __init__(self):
        self.input = InputProcessor(None, vocab_size=257, max_model_len=1000, end_token_ids=[END])
        self.output = OutputProcessor(DETOKENIZERS)

    def add(self, request_id="r", kind=OutputKind.CUMULATIVE, **params):
        self.output.add(self.input.process(request_id, [65], SamplingParams(**params)), kind)

    def step(self, *outputs):
        return self.output.process(StepOutputs(others=list(outputs)))

    def plain_step(self, tokens):
        """A token and nothing else for each request."""
        return self.output.process(StepOutputs(request_ids=list(tokens), token_ids=list(tokens.values())))


def out(text="", request_id="r", **kwargs):
    tokens = [END if c == "$" else b for c in text for b in ([0] if c == "$" else c.encode())]
    return EngineOutput(request_id=request_id, new_token_ids=tokens, **kwargs)


@pytest.fixture
def harness():
    return Harness()


def test_cumulative_delta_and_final(harness):
    for kind in OutputKind:
        harness.add(kind.value, kind=kind)
    names = [kind.value for kind in OutputKind]
    first = harness.step(*(out("ab", name) for name in names)).request_outputs
    assert [o.request_id for o in first] == ["cumulative", "delta"]
    last = harness.step(*(out("c", name, finish_reason="length") for name in names)).request_outputs
    assert [(o.outputs[0].text, o.finished) for o in first] == [("ab", False)] * 2
    assert [o.outputs[0].text for o in last] == ["abc", "c", "abc"]
    assert [o.outputs[0].token_ids for o in last] == [[97, 98, 99], [99], [97, 98, 99]]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in last)
    assert not harness.output.has_unfinished()


def test_end_token_is_no_text_and_no_reason(harness):
    harness.add()
    (result,) = harness.step(out("ab$", finish_reason="stop", stop_reason=END)).request_outputs
    answer = result.outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason) == (
        "ab",
        [97, 98, END],
        "stop",
        None,
    )


def test_requested_stop_token_is_no_text_but_the_reason(harness):
    harness.add(stop_token_ids=[99])
    answer = harness.step(out("abc", finish_reason="stop", stop_reason=99)).request_outputs[0].outputs[0]
    assert (answer.text, answer.token_ids[-1], answer.stop_reason) == ("ab", 99, 99)


def test_stop_string_across_steps_ends_the_engine_request(harness):
    harness.add(kind=OutputKind.DELTA, stop_strings=["END"])
    shown = [harness.step(out(part)).request_outputs[0].outputs[0].text for part in ("xE", "N", "xEN")]
    assert shown == ["x", "", "ENx"]
    result = harness.step(out("Dyz"))
    answer = result.request_outputs[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", "END")
    assert answer.token_ids == [68]  # nothing after the token that completed it
    assert result.abort_ids == ["r"]
    late = harness.step(out("more"))
    assert late.request_outputs == []
    assert late.abort_ids == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(b"xEND\xe2\x82\xac"), max_size=12), st.sampled_from(OutputKind))
def test_plain_tokens_are_outputs_like_others(tokens, kind):
    plain, others = Harness(), Harness()
    for harness in (plain, others):
        harness.add("r", kind, stop_strings=["END"])
        harness.add("s", kind, n=2)
        names = list(harness.output._answers)  # three: two of them answer the same request
        harness.step(*(out("a", name) for name in names))
    for token in [*tokens, 65]:
        got = plain.plain_step(dict.fromkeys(names, token))
        expected = others.step(*(EngineOutput(request_id=name, new_token_ids=[token]) for name in names))
        assert got.abort_ids == expected.abort_ids
        assert [(o.request_id, o.outputs, o.finished) for o in got.request_outputs] == [
            (o.request_id, o.outputs, o.finished) for o in expected.request_outputs
        ]
        counts = [[r.metrics.num_generation_tokens for r in h.output._requests.values()] for h in (plain, others)]
        assert counts[0] == counts[1]


def test_stop_string_in_the_last_step_needs_no_abort(harness):
    harness.add(stop_strings=["b"])
    result = harness.step(out("ab", finish_reason="length"))
    assert result.abort_ids == []
    assert result.request_outputs[0].outputs[0].stop_reason == "b"


def test_held_back_text_comes_out_at_the_end(harness):
    harness.add(kind=OutputKind.DELTA, stop_strings=["END"])
    euro = "\u20ac".encode()
    harness.step(out("xEN"))
    last = harness.step(EngineOutput(request_id="r", new_token_ids=list(euro[:2]), finish_reason="length"))
    assert last.request_outputs[0].outputs[0].text == "EN\ufffd"


def test_stop_strings_wait_for_min_tokens(harness):
    harness.add(stop_strings=["b"], min_tokens=3)
    assert not harness.step(out("ab")).request_outputs[0].finished
    answer = harness.step(out("b")).request_outputs[0].outputs[0]
    assert (answer.text, answer.stop_reason) == ("ab", "b")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("aE\u00e9N", max_size=4), max_size=8), st.sampled_from([["EN"], ["E\u00e9", "NN"], ["\u00e9a"]])
)
def test_deltas_add_up_and_never_show_a_stop_string(parts, stops):
    harness = Harness()
    for kind in OutputKind:
        harness.add(kind.value, kind=kind, stop_strings=stops)
    shown, totals = "", []
    for i, part in enumerate([*parts, ""]):
        reason = "length" if i == len(parts) else None
        for o in harness.step(*(out(part, k.value, finish_reason=reason) for k in OutputKind)).request_outputs:
            if o.request_id == "delta":
                shown += "".join(a.text for a in o.outputs)
            elif o.finished:
                totals.append(o.outputs[0].text)
    text = "".join(parts)
    cut = min((text.find(s) for s in stops if s in text), default=len(text))
    assert totals == [shown, shown]
    assert shown == text[:cut]


def test_n_answers_are_one_output(harness):
    harness.add(n=2)
    (first,) = harness.step(out("b", "r_1"), out("a", "r_0")).request_outputs
    assert [(a.index, a.text) for a in first.outputs] == [(0, "a"), (1, "b")]
    (second,) = harness.step(out("c", "r_1", finish_reason="length")).request_outputs
    assert not second.finished
    (third,) = harness.step(out("d", "r_0", finish_reason="length")).request_outputs
    assert third.finished
    assert [a.text for a in third.outputs] == ["ad", "bc"]
    assert third.metrics.num_generation_tokens == 4


def test_deltas_of_n_answers_name_only_what_changed(harness):
    harness.add(n=2, kind=OutputKind.DELTA)
    (first,) = harness.step(out("b", "r_1")).request_outputs
    assert [(a.index, a.text) for a in first.outputs] == [(1, "b")]


def test_stop_string_of_one_answer_leaves_the_other(harness):
    harness.add(n=2, stop_strings=["x"])
    result = harness.step(out("x", "r_0"), out("b", "r_1"))
    assert result.abort_ids == ["r_0"]
    assert not result.request_outputs[0].finished
    assert harness.step(out("c", "r_1", finish_reason="length")).request_outputs[0].outputs[1].text == "bc"


def test_outputs_follow_the_engines_order(harness):
    for name in "abc":
        harness.add(name)
    assert [o.request_id for o in harness.step(*(out("x", n) for n in "cab")).request_outputs] == ["c", "a", "b"]


def test_logprobs(harness):
    harness.add(logprobs=1)
    position = TokenLogprobs(token_ids=[97, 98, 97], logprobs=[-2.0, -0.5, -2.0], rank=2)
    final = TokenLogprobs(token_ids=[END, END, 98], logprobs=[-0.25, -0.25, -3.0], rank=1)
    harness.step(out("a", new_logprobs=[position]))
    step = out("$", new_logprobs=[final], finish_reason="stop", stop_reason=END)
    answer = harness.step(step).request_outputs[0].outputs[0]
    chosen, other = answer.logprobs[0][97], answer.logprobs[0][98]
    assert (chosen.logprob, chosen.rank, chosen.decoded_token) == (-2.0, 2, "a")
    assert (other.logprob, other.rank, other.decoded_token) == (-0.5, 1, "b")
    assert list(answer.logprobs[1]) == [END]
    assert answer.logprobs[1][END].decoded_token == "<end>"
    assert answer.cumulative_logprob == -2.25


def test_logprobs_end_with_the_tokens(harness):
    harness.add(logprobs=0, stop_strings=["b"])
    positions = [TokenLogprobs(token_ids=[t], logprobs=[-1.0], rank=1) for t in b"abc"]
    answer = harness.step(out("abc", new_logprobs=positions)).request_outputs[0].outputs[0]
    assert answer.token_ids == [97, 98]
    assert len(answer.logprobs) == 2


def test_prompt_logprobs(harness):
    harness.add(prompt_logprobs=0)
    position = TokenLogprobs(token_ids=[66], logprobs=[-1.5], rank=4)
    harness.step(out("a", prompt_logprobs=[position], num_cached_tokens=16))
    result = harness.step(out("b", finish_reason="length")).request_outputs[0]
    assert result.prompt_logprobs[0] is None
    assert result.prompt_logprobs[1][66].rank == 4
    assert result.num_cached_tokens == 16


def test_an_error_ends_its_request_alone(harness):
    harness.add("bad")
    harness.add("good")
    bad, good = harness.step(
        out(request_id="bad", finish_reason="error", error="NaN"), out("a", "good")
    ).request_outputs
    assert bad.finished
    assert (bad.error, bad.outputs[0].finish_reason) == ("NaN", "error")
    assert (good.finished, good.error) == (False, None)


def test_abort(harness):
    harness.add(n=2, stop_strings=["xyz"])
    harness.step(out("ax", "r_0", finish_reason="length"), out("bx", "r_1"))
    result, engine_ids = harness.output.abort("r")
    assert engine_ids == ["r_1"]
    assert [(a.text, a.finish_reason) for a in result.outputs] == [("ax", "length"), ("bx", "abort")]
    assert result.finished
    assert harness.step(out("c", "r_1")).request_outputs == []
    assert harness.output.abort("r") == (None, [])


def test_times_are_in_order(harness):
    harness.add()
    (first,) = harness.step(out("a")).request_outputs
    assert first.metrics.finished_time is None
    assert first.metrics.tpot is None
    (last,) = harness.step(out("b", finish_reason="length")).request_outputs
    metrics = last.metrics
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.ttft == metrics.first_token_time - metrics.arrival_time
    assert metrics.tpot == metrics.finished_time - metrics.first_token_time
