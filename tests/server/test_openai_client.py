"""The `openai` package, unmodified, against a live server with the embedded model."""

import asyncio
import math

import httpx
import openai
import pytest

from atom import LLM, SamplingParams

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
STORY = "Once upon a time, in a small village by the sea,"
WORDS = "One two three four five six"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def offline():
    """The same model in this process: what the server's answers must be."""
    with LLM(model=MODEL, dtype="float32", device="cpu", max_model_len=1024, max_num_seqs=4) as llm:
        yield llm


def complete(client, prompt=STORY, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 12, **options})


def chat(client, **options):
    options = {"temperature": 0, "max_tokens": 16, "messages": QUESTION} | options
    return client.chat.completions.create(model=MODEL, **options)


def text_of(stream):
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


# -- what is said --


def test_a_greedy_completion_is_the_offline_one(client, offline):
    answer = complete(client, max_tokens=24, extra_body={"return_token_ids": True})
    (expected,) = offline.generate([STORY], SamplingParams(temperature=0, max_tokens=24))
    assert answer.choices[0].token_ids == expected.outputs[0].token_ids
    assert answer.choices[0].prompt_token_ids == expected.prompt_token_ids
    assert answer.choices[0].text == expected.outputs[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == 24


def test_a_greedy_chat_is_the_offline_one(client, offline):
    answer = chat(client, max_tokens=32)
    expected = offline.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32))
    expected = expected[0] if isinstance(expected, list) else expected
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_sampled_answer_follows_from_its_seed(client, offline):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "extra_body": {"top_k": 40, "return_token_ids": True}}
    first, again = (complete(client, **options).choices[0] for _ in range(2))
    other = complete(client, **options | {"seed": 8}).choices[0]
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=7, max_tokens=12)
    (expected,) = offline.generate([STORY], params)
    assert first.token_ids == again.token_ids == expected.outputs[0].token_ids
    assert other.token_ids != first.token_ids


# -- streams --


@pytest.mark.parametrize("prompt", [STORY, "Write with emoji: 🙂👩‍👩‍👧 日本語 ñ"], ids=["ascii", "unicode"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"])
def test_a_stream_says_what_a_completion_says(client, prompt, options):
    options = {"max_tokens": 24, **options}
    assert (
        text_of(complete(client, prompt, stream=True, **options)) == complete(client, prompt, **options).choices[0].text
    )


def test_a_streamed_chat(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count(None) == len(chunks) - 2
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_usage_comes_only_when_asked_for(client):
    assert all(chunk.usage is None and chunk.choices for chunk in complete(client, stream=True))
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 12
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in complete(client, stream=True, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 12


def test_an_asynchronous_client_with_many_streams(server, client):
    prompts = [f"{STORY} {name} said:" for name in ("Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hal")]

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt):
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, temperature=0, max_tokens=12, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
            return answer, await asyncio.gather(*map(one, prompts))

    answer, texts = asyncio.run(run())
    assert "Paris" in answer.choices[0].message.content
    assert texts == [complete(client, prompt).choices[0].text for prompt in prompts]


# -- several prompts, several answers --


def test_batches_of_prompts_and_token_ids(client, offline):
    ids = [offline.engine.tokenizer.encode(text) for text in (STORY, WORDS)]
    one_each = [complete(client, text).choices[0].text for text in (STORY, WORDS)]
    for prompts in ([STORY, WORDS], ids):
        answer = complete(client, prompts)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == one_each
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 24
    assert complete(client, ids[1]).choices[0].text == one_each[1]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_to_several_prompts(client, stream):
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    texts = {}
    if stream:
        reasons = {}
        for chunk in complete(client, [STORY, WORDS], stream=True, **options):
            (choice,) = chunk.choices
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
        assert set(reasons.values()) <= {"length", "stop"}
    else:
        answer = complete(client, [STORY, WORDS], **options)
        texts = {choice.index: choice.text for choice in answer.choices}
        assert answer.usage.completion_tokens <= 6 * 8
    assert sorted(texts) == list(range(6))
    assert len(set(texts.values())) == 6
    alone = complete(client, WORDS, **options)
    assert [texts[3 + i] for i in range(3)] == [choice.text for choice in alone.choices]


def test_several_answers_of_a_chat(client):
    options = {"n": 2, "temperature": 1.2, "seed": 1, "max_tokens": 12}
    answer = chat(client, **options)
    assert [choice.index for choice in answer.choices] == [0, 1]
    texts = ["", ""]
    for chunk in chat(client, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


# -- where answers end --


@pytest.mark.parametrize("stop", [" four", [" five", " four"], ["ur f", "zzz"]], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, stop, stream):
    prompt = "Count: one two three four five six seven eight nine ten. Count again: one two three"
    free = complete(client, prompt).choices[0].text
    first = min(free.find(text) for text in ([stop] if isinstance(stop, str) else stop) if text in free)
    answer = complete(client, prompt, stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        text, end = text_of(chunks), chunks[-1].choices[0]
    else:
        text, end = answer.choices[0].text, answer.choices[0]
    assert text == free[:first]
    assert end.finish_reason == "stop"
    assert end.stop_reason in stop


def test_lengths_and_stop_tokens(client):
    free = complete(client, extra_body={"return_token_ids": True}).choices[0]
    third = free.token_ids[2]
    assert third not in free.token_ids[:2]
    stopped = complete(client, extra_body={"stop_token_ids": [third], "return_token_ids": True}).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[:3]
    assert stopped.stop_reason == third
    extra = {"stop_token_ids": [third], "min_tokens": 6, "return_token_ids": True}
    held = complete(client, extra_body=extra).choices[0]
    assert len(held.token_ids) >= 6
    assert third not in held.token_ids[:5]
    assert chat(client, max_completion_tokens=3, max_tokens=openai.omit).usage.completion_tokens == 3
    longer = chat(client, max_tokens=24, extra_body={"ignore_eos": True})
    assert longer.usage.completion_tokens == 24
    assert longer.choices[0].finish_reason == "length"
    assert chat(client, max_tokens=openai.omit).choices[0].finish_reason == "stop"  # as long as it takes


def test_what_is_forbidden_or_forced(client, offline):
    free = complete(client, max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    banned = complete(client, max_tokens=1, logit_bias={str(free): -100}, extra_body={"return_token_ids": True})
    assert banned.choices[0].token_ids != [free]
    (wanted,) = offline.engine.tokenizer.encode(" apple")
    assert complete(client, max_tokens=3, logit_bias={str(wanted): 100}).choices[0].text == " apple apple apple"
    urged = {"logit_bias": {str(wanted): 20}, "max_tokens": 12}
    assert complete(client, **urged).choices[0].text == " apple" * 12
    for penalty in ({"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 10.0}}):
        text = complete(client, **urged, **penalty).choices[0].text
        assert text.startswith(" apple")
        assert text != " apple" * 12
    loop = "la la la la la la la la"
    assert complete(client, loop, presence_penalty=2).choices[0].text != complete(client, loop).choices[0].text
    assert (
        complete(client, temperature=2.0, seed=4, extra_body={"top_k": 1}).choices[0].text
        == complete(client).choices[0].text
    )
    assert (
        complete(client, temperature=2.0, seed=4, extra_body={"min_p": 1.0}).choices[0].text
        == complete(client).choices[0].text
    )


# -- log probabilities --


def check_completion_logprobs(logprobs, text, first_is_prompt=False):
    assert "".join(logprobs.tokens) == text
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens)
    for i, (token, value, top) in enumerate(
        zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    ):
        if first_is_prompt and i == 0:
            assert value is None
            assert top is None
            continue
        assert value <= 0
        assert top[token] == value
        assert 2 <= len(top) <= 3
        assert sum(map(math.exp, top.values())) <= 1.0001


def test_logprobs_of_a_completion(client):
    choice = complete(client, logprobs=2).choices[0]
    check_completion_logprobs(choice.logprobs, choice.text)
    for value, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert value == max(top.values())  # it is greedy
    only = complete(client, logprobs=0).choices[0].logprobs
    assert only.token_logprobs == choice.logprobs.token_logprobs
    assert complete(client).choices[0].logprobs is None


def test_logprobs_stream_with_their_text(client):
    whole = complete(client, logprobs=2).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=2, stream=True)]
    parts = [part for part in parts if part is not None]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [offset for part in parts for offset in part.text_offset] == whole.text_offset
    assert [value for part in parts for value in part.token_logprobs] == pytest.approx(whole.token_logprobs, abs=1e-4)


def test_echo_scores_the_prompt(client):
    choice = complete(client, WORDS, echo=True, logprobs=2, max_tokens=4).choices[0]
    assert choice.text.startswith(WORDS)
    check_completion_logprobs(choice.logprobs, choice.text, first_is_prompt=True)
    scored = complete(client, WORDS, echo=True, logprobs=2, max_tokens=0)
    assert scored.choices[0].text == WORDS
    assert scored.usage.completion_tokens == 0
    values = scored.choices[0].logprobs.token_logprobs
    assert values[0] is None
    assert values[1:] == pytest.approx(choice.logprobs.token_logprobs[1 : len(values)], abs=1e-4)
    # What the model says next has the same log probability when it is part of the prompt.
    answer = complete(client, WORDS, logprobs=0, max_tokens=1).choices[0]
    longer = complete(client, WORDS + answer.text, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert longer.logprobs.token_logprobs[-1] == pytest.approx(answer.logprobs.token_logprobs[0], abs=1e-3)
    assert text_of(complete(client, WORDS, echo=True, max_tokens=4, stream=True)) == choice.text


def test_logprobs_of_a_chat(client):
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    said = [entry for entry in content if entry.token != "<|im_end|>"]
    assert bytes(byte for entry in said for byte in entry.bytes).decode() == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


# -- the rest of the API --


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    assert model.max_model_len == 1024
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_tokens_go_back_and_forth(server, offline):
    text = "Grüße, 世界! 🙂\n\tdef f(x): return x"
    with httpx.Client(base_url=server.url) as http:
        answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert answer["tokens"] == offline.engine.tokenizer.encode(text)
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 1024
        assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
        conversation = http.post("/tokenize", json={"messages": QUESTION}).json()
        rendered = http.post("/detokenize", json={"tokens": conversation["tokens"]}).json()["prompt"]
        assert QUESTION[0]["content"] in rendered
        assert rendered.endswith("<|im_start|>assistant\n")
        asked = {"messages": QUESTION, "max_tokens": 1}
        assert http.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"] == conversation["count"]


def test_content_in_parts_and_unknown_fields(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    extra = {"some_future_option": {"a": 1}}
    assert chat(client, messages=parts, extra_body=extra).choices[0].message == chat(client).choices[0].message
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(client, messages=begun, extra_body=extra).choices[0].message.content.strip().startswith("Paris")


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, temperature=-1, stream=stream)
        assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "word " * 1100)
    assert caught.value.code == "context_length_exceeded"


def test_priority_and_salt_are_taken(client):
    extra = {"priority": -5, "cache_salt": "mine"}
    assert complete(client, extra_body=extra).choices[0].text == complete(client).choices[0].text
