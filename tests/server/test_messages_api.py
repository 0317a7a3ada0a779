"""/v1/messages with the `anthropic` package, unmodified, against a live server with the embedded model."""

import asyncio

import anthropic
import httpx
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
# The client has left the sampling parameters to models; the protocol still has them.
GREEDY = {"model": "smollm2", "max_tokens": 32, "extra_body": {"temperature": 0}}
TOOL = {
    "name": "weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_gets_an_answer(client):
    answer = client.messages.create(messages=QUESTION, **GREEDY)
    assert [block.type for block in answer.content] == ["text"]
    assert "Paris" in answer.content[0].text
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert 0 < answer.usage.output_tokens <= 32
    assert answer._request_id


def test_a_stream_brings_its_events_in_order(client):
    whole = client.messages.create(messages=QUESTION, **GREEDY)
    events = list(client.messages.create(messages=QUESTION, stream=True, **GREEDY))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 3
    assert kinds == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == whole.content[0].text
    assert events[-2].delta.stop_reason == "end_turn"
    assert events[-2].usage.output_tokens == whole.usage.output_tokens


def test_the_clients_stream_helper(client):
    with client.messages.stream(messages=QUESTION, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_text() == text
        usage = stream.get_final_message().usage
    num_input = client.messages.count_tokens(model="smollm2", messages=QUESTION).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == num_input


def test_async(server):
    async def ask():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.messages.create(messages=QUESTION, **GREEDY),
                client.messages.create(messages=QUESTION, stream=True, **GREEDY),
            )
            return whole, [event async for event in stream]

    whole, events = asyncio.run(ask())
    assert "Paris" in whole.content[0].text
    assert events[-1].type == "message_stop"


@pytest.mark.parametrize("stream", [False, True])
def test_why_an_answer_ends(client, stream):
    def ends(**options):
        answer = client.messages.create(**(GREEDY | {"messages": QUESTION, "stream": stream} | options))
        last = list(answer)[-2].delta if stream else answer
        return last.stop_reason, last.stop_sequence

    assert ends(max_tokens=2) == ("max_tokens", None)
    assert ends(stop_sequences=["xyzzy", "Paris"]) == ("stop_sequence", "Paris")
    assert ends() == ("end_turn", None)


def test_an_answer_goes_on_where_the_client_began_it(client):
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    answer = client.messages.create(messages=begun, **GREEDY)
    assert answer.content[0].text.lstrip().startswith("Paris")


def test_blocks_are_read(client):
    def count(**options):
        return client.messages.count_tokens(model="smollm2", **options).input_tokens

    text = QUESTION[0]["content"]
    assert count(messages=QUESTION) == count(messages=[{"role": "user", "content": [{"type": "text", "text": text}]}])
    assert count(messages=QUESTION, system="You are a pirate, and answer as one.") != count(messages=QUESTION)
    conversation = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Rome.", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    assert count(messages=conversation, tools=[TOOL]) > count(messages=conversation[:1])
    answer = client.messages.create(messages=conversation, tools=[TOOL], tool_choice={"type": "auto"}, **GREEDY)
    assert answer.content[0].type == "text"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 1}}}}, "output_config"),
        ({"model": "absent"}, "model"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_refused_by_name(server, options, field, stream):
    body = {"model": "smollm2", "max_tokens": 4, "messages": QUESTION, "stream": stream} | options
    answer = httpx.post(f"{server.url}/v1/messages", json=body, headers={"X-Request-Id": "mine"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == ("not_found_error" if field == "model" else "invalid_request_error")
    assert field in answer.json()["error"]["message"]
    assert answer.json()["request_id"] == answer.headers["request-id"] == "mine"


def test_the_clients_parse_gives_an_object(client):
    schema = {"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}
    config = {"format": {"type": "json_schema", "schema": schema | {"additionalProperties": False}}}
    answer = client.messages.create(messages=QUESTION, output_config=config, **GREEDY | {"max_tokens": 100})
    assert answer.content[0].text.replace(" ", "").replace("\n", "") in ('{"big":true}', '{"big":false}')


def test_every_layer_answers_in_the_protocols_shape(guarded_server):
    client = anthropic.Anthropic(base_url=guarded_server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(messages=QUESTION, **GREEDY)
    assert caught.value.body["error"]["type"] == "authentication_error"
    assert caught.value.request_id

    client = anthropic.Anthropic(base_url=guarded_server.url, api_key="secret", max_retries=0)
    assert client.messages.create(messages=QUESTION, **GREEDY).content
    with pytest.raises(anthropic.RequestTooLargeError) as large:
        client.messages.create(messages=[{"role": "user", "content": "x" * 6000}], **GREEDY)
    assert large.value.body["error"]["type"] == "request_too_large"

    headers = {"x-api-key": "secret"}
    url = f"{guarded_server.url}/v1/messages"
    for answer in (
        httpx.get(url, headers=headers),
        httpx.post(f"{url}/absent", headers=headers, json={}),
        httpx.post(url, headers=headers, content=b"{"),
        httpx.post(url, headers=headers | {"content-type": "application/json"}, content=b"{"),
    ):
        assert answer.status_code in (400, 404, 405, 415)
        assert answer.json()["type"] == "error"
