"""The offline API on the embedded model: prompts and parameters of every kind, errors beside good requests."""

import logging
import math

import pytest
from tiny_models import make_checkpoint

from atom import LLM, SamplingParams
from atom.model_engine.output_processor import OutputKind
from atom.utils.errors import ConfigError, ModelLoadError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
TEXTS = ["The capital of France is", "Once upon a time", "One, two, three,"]
MAX_MODEL_LEN = 256


@pytest.fixture(scope="module")
def llm():
    with LLM(model="smollm2", dtype="float32", device="cpu", max_model_len=MAX_MODEL_LEN, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture
def tiny(tmp_path):
    """For what hangs on no text: token ids in and out, and a prefix cache."""
    settings = {"load_dummy": True, "max_model_len": 128, "max_num_seqs": 2, "enable_prefix_caching": True}
    with LLM(make_checkpoint("llama", tmp_path), dtype="float32", device="cpu", **settings) as llm:
        yield llm


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def test_one_prompt_or_many_in_every_form(llm):
    expected = texts(llm.generate(TEXTS, SHORT))
    assert "Paris" in expected[0]
    ids = [llm.get_tokenizer().encode(text) for text in TEXTS]
    assert texts(llm.generate(ids, SHORT)) == expected
    assert texts(llm.generate([{"prompt_token_ids": i} for i in ids], SHORT)) == expected
    assert texts(llm.generate([{"prompt": t} for t in TEXTS], SHORT)) == expected
    for prompt in (TEXTS[1], ids[1], {"prompt": TEXTS[1]}):
        (output,) = llm.generate(prompt, SHORT)
        assert output.outputs[0].text == expected[1]
        assert output.prompt_token_ids == ids[1]
    assert llm.generate([], SHORT) == []


def test_parameters_of_each_prompt(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 9, 5)]
    outputs = llm.generate(TEXTS, params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 9, 5]
    assert [o.prompt for o in outputs] == TEXTS
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    with pytest.raises(RequestError, match="2 for 3 prompts"):
        llm.generate(TEXTS, params[:2])
    with pytest.raises(RequestError, match="one SamplingParams or one a prompt"):
        llm.generate(TEXTS, {"temperature": 0})


def test_a_wrong_prompt_is_rejected_alone(llm, caplog):
    bad = {"too long": [1] * MAX_MODEL_LEN, "empty": "", "vocabulary": [10**6], "type": 3.5}
    with caplog.at_level(logging.ERROR, logger="atom"):
        outputs = llm.generate([TEXTS[0], *bad.values(), TEXTS[1]], GREEDY)
    assert texts([outputs[0], outputs[-1]]) == texts(llm.generate(TEXTS[:2], GREEDY))
    for output in outputs[1:-1]:
        assert output.finished
        assert output.outputs == []
        assert output.error
    assert str(MAX_MODEL_LEN) in outputs[1].error
    assert len([r for r in caplog.records if "rejected" in r.getMessage()]) == len(bad)
    with pytest.raises(RequestError, match="empty"):
        llm.generate("", GREEDY)


def test_the_longest_prompt_leaves_room_for_one_token(llm):
    (output,) = llm.generate([[5] * (MAX_MODEL_LEN - 1)], GREEDY)
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_stop_strings_end_the_text_before_them(llm):
    full = llm.generate(TEXTS[1], GREEDY)[0].outputs[0].text
    for start, end in ((3, 5), (4, 12), (9, 10)):  # inside a token, across tokens, one character
        stop = full[start:end]
        answer = llm.generate(TEXTS[1], SamplingParams(temperature=0, max_tokens=16, stop_strings=[stop]))[0].outputs[0]
        assert answer.text == full[: full.index(stop)]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert llm.engine.stats()["running"] == 0


def test_stop_token_ids(llm):
    tokens = llm.generate(TEXTS[2], GREEDY)[0].outputs[0].token_ids
    stop = tokens[4]
    params = SamplingParams(temperature=0, max_tokens=16, stop_token_ids=[stop], ignore_eos=True)
    answer = llm.generate(TEXTS[2], params)[0].outputs[0]
    assert answer.token_ids == tokens[: tokens.index(stop) + 1]
    assert answer.stop_reason == stop
    assert answer.text == llm.get_tokenizer().decode(answer.token_ids[:-1])


def test_streams_add_up_and_interleave(llm):
    expected = texts(llm.generate(TEXTS[:2], GREEDY))
    streams = [llm.stream(text, GREEDY) for text in TEXTS[:2]]
    shown = ["", ""]
    first = next(streams[0])
    shown[0] += first.outputs[0].text
    assert not first.finished
    for i in (1, 0):
        for output in streams[i]:
            shown[i] += output.outputs[0].text
    assert shown == expected
    assert not llm.engine.has_unfinished_requests()


def test_a_stream_closed_early_is_aborted(llm):
    stream = llm.stream(TEXTS[0], GREEDY)
    next(stream)
    assert llm.engine.has_unfinished_requests()
    stream.close()
    assert not llm.engine.has_unfinished_requests()
    assert texts(llm.generate(TEXTS[:1], GREEDY)) == texts(llm.generate([TEXTS[0]], GREEDY))
    with pytest.raises(RequestError):
        next(llm.stream("", GREEDY))


def test_several_answers_differ_and_repeat_by_seed(llm):
    params = SamplingParams(temperature=1.0, max_tokens=12, n=3, seed=11, ignore_eos=True)
    first, again = (llm.generate(TEXTS[1], params)[0] for _ in range(2))
    assert [a.index for a in first.outputs] == [0, 1, 2]
    assert len({tuple(a.token_ids) for a in first.outputs}) == 3
    assert [a.token_ids for a in first.outputs] == [a.token_ids for a in again.outputs]
    alone = llm.generate(TEXTS[1], SamplingParams(temperature=1.0, max_tokens=12, seed=11, ignore_eos=True))[0]
    assert alone.outputs[0].token_ids == first.outputs[0].token_ids


def test_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    output = llm.generate(TEXTS[0], params)[0]
    answer = output.outputs[0]
    assert len(answer.logprobs) == 4
    for token, position in zip(answer.token_ids, answer.logprobs, strict=True):
        assert len(position) == 3  # greedy: the chosen one is the first of the three
        assert position[token].rank == 1
        assert position[token].logprob == max(p.logprob for p in position.values()) <= 0
    chosen = [p[t].logprob for t, p in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert math.isclose(answer.cumulative_logprob, sum(chosen), rel_tol=1e-6)
    assert "".join(p[t].decoded_token for t, p in zip(answer.token_ids, answer.logprobs, strict=True)) == answer.text
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, position in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert token in position


def test_metrics(llm):
    metrics = llm.generate(TEXTS[0], GREEDY)[0].metrics
    assert 0 < metrics.ttft < 60
    assert 0 < metrics.tpot < 10
    assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time
    assert metrics.num_generation_tokens == 16


def test_chat_takes_one_conversation_or_many(llm):
    params = SamplingParams(temperature=0, max_tokens=24)
    questions = ["What is the capital of France?", "What is 2 + 2?"]
    conversations = [[{"role": "user", "content": q}] for q in questions]
    many = texts(llm.chat(conversations, params))
    assert "Paris" in many[0]
    assert "4" in many[1]
    assert texts(llm.chat(conversations[0], params)) == many[:1]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert llm.chat(conversations[0], params, chat_template=template)[0].prompt == questions[0]
    for wrong in ([], "hello", [[]]):
        with pytest.raises(RequestError, match="messages must be"):
            llm.chat(wrong, params)
    with pytest.raises(RequestError, match="template"):
        llm.chat(conversations[0], params, chat_template="{{ raise_exception('no') }}")


def test_the_default_length_is_mentioned_once(tiny, caplog):
    with caplog.at_level(logging.WARNING, logger="atom"):
        for _ in range(2):
            tiny.generate([[7, 8, 9]], SamplingParams(temperature=0, logit_bias={2: -100}))
    assert len([r for r in caplog.records if "max_tokens" in r.getMessage()]) == 1


def test_engine_requests(llm):
    engine = llm.engine
    engine.add_request("a", TEXTS[0], GREEDY)
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request("a", TEXTS[1], GREEDY)
    engine.add_request("b", TEXTS[1], SamplingParams(n=2, max_tokens=16, ignore_eos=True))
    with pytest.raises(RequestError, match="in use"):
        engine.add_request("b_1", TEXTS[1], GREEDY)
    engine.add_request("c", TEXTS[2], GREEDY, output_kind=OutputKind.FINAL)
    lengths, finals = [], {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == "a":
                lengths.append(len(output.outputs[0].token_ids))
            if output.finished:
                finals[output.request_id] = output
            elif output.request_id == "b" and len(lengths) == 3:
                aborted = engine.abort_request("b")
    assert lengths == list(range(1, 17))
    assert set(finals) == {"a", "c"}
    assert [a.finish_reason for a in aborted.outputs] == ["abort", "abort"]
    assert engine.abort_request("b") is None
    assert engine.stats()["running"] == 0
    assert engine.stats()["kv_cache_usage"] == 0


def test_prefix_cache_is_reported_reset_and_salted(tiny):
    prompt = [7] * 64 + [8]

    def cached(**options):
        return tiny.generate([prompt], GREEDY, **options)[0].num_cached_tokens

    assert [cached(), cached()] == [0, 64]
    assert [cached(cache_salt="other"), cached(cache_salt="other")] == [0, 64]
    assert tiny.reset_prefix_cache()
    assert cached() == 0


def test_wrong_settings_raise_typed_errors():
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM(model="smollm2", max_modell_len=3)
    with pytest.raises(ModelLoadError, match="/no/such/place"):
        LLM(model="/no/such/place")
