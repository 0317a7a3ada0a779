"""/v1/responses with the `openai` package, unmodified, against a live server with the embedded model."""

import asyncio
import re
import time

import httpx
import openai
import pytest
from pydantic import BaseModel

QUESTION = "What is the capital of France? Answer in one short sentence."
GREEDY = {"model": "smollm2", "temperature": 0, "max_output_tokens": 32}
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_text_gets_an_answer(client):
    answer = client.responses.create(input=QUESTION, **GREEDY)
    assert "Paris" in answer.output_text
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.output[0].role == "assistant"
    assert answer.output[0].status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens == 0


def test_a_stream_brings_its_events_in_order(client):
    events = list(client.responses.create(input=QUESTION, stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 3
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    whole = client.responses.create(input=QUESTION, **GREEDY)
    assert text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[-1].response.output[0].id}


def test_the_clients_stream_helper(client):
    with client.responses.stream(input=QUESTION, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text


def test_async(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.responses.create(input=QUESTION, **GREEDY),
                client.responses.create(input=QUESTION, stream=True, **GREEDY),
            )
            return whole, [event async for event in stream]

    whole, events = asyncio.run(ask())
    assert "Paris" in whole.output_text
    assert events[-1].response.output_text == "".join(
        event.delta for event in events if event.type == "response.output_text.delta"
    )


def test_what_reaches_its_limit_is_incomplete(client):
    answer = client.responses.create(model="smollm2", input="Count to a hundred.", max_output_tokens=3)
    assert answer.status == answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(model="smollm2", input="Count to a hundred.", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.usage.output_tokens == 3


def test_conversations_go_on(client):
    first = client.responses.create(input="My name is Zebulon.", instructions="Be brief.", **GREEDY)
    second = client.responses.create(
        input="What is my name?", previous_response_id=first.id, instructions="Be brief.", **GREEDY
    )
    assert second.previous_response_id == first.id
    # It has read just what a client that sends the whole conversation makes it read.
    whole = [
        {"role": "user", "content": "My name is Zebulon."},
        *(item.model_dump() for item in first.output),
        {"role": "user", "content": [{"type": "input_text", "text": "What is my name?"}]},
    ]
    explicit = client.responses.create(input=whole, instructions="Be brief.", **GREEDY)
    assert explicit.usage.input_tokens == second.usage.input_tokens
    assert explicit.output_text == second.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_stored_until_they_are_deleted(client, stream):
    answer = client.responses.create(input=QUESTION, metadata={"a": "b"}, stream=stream, **GREEDY)
    if stream:
        answer = list(answer)[-1].response
    again = client.responses.retrieve(answer.id)
    assert again.metadata == {"a": "b"}
    assert again.model_dump() == answer.model_dump()
    client.responses.delete(answer.id)
    for use in (
        lambda: client.responses.retrieve(answer.id),
        lambda: client.responses.delete(answer.id),
        lambda: client.responses.create(input="x", previous_response_id=answer.id, **GREEDY),
    ):
        with pytest.raises(openai.NotFoundError):
            use()


def test_store_false_keeps_nothing(client):
    answer = client.responses.create(input=QUESTION, store=False, **GREEDY)
    assert answer.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


class City(BaseModel):
    name: str
    big: bool


def test_the_clients_parse_gives_an_object(client):
    answer = client.responses.parse(
        model="smollm2", input="Tell me about Paris.", text_format=City, temperature=0, max_output_tokens=300
    )
    assert isinstance(answer.output_parsed, City)


def test_calls_and_their_results_are_read(client):
    conversation = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    answer = client.responses.create(input=conversation, tools=[TOOL], **GREEDY)
    assert answer.status == "completed" or answer.incomplete_details
    assert answer.tools[0].name == "weather"
    short = client.responses.create(input=conversation[:1], tools=[TOOL], **GREEDY)
    assert answer.usage.input_tokens > short.usage.input_tokens


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"input": []}, "input"),
        ({"input": [7]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "{"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "b"}]}, "input"),
        ({"input": "word " * 3000}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a", "parameters": 1}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "absent"}, "tools": [TOOL]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 1}}}}, "text.format"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"model": "absent"}, "model"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_refused_by_name(server, options, field, stream):
    body = {"model": "smollm2", "input": "hi", "max_output_tokens": 4, "stream": stream} | options
    answer = httpx.post(f"{server.url}/v1/responses", json=body)
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500
    assert error["param"] == field
    assert field.partition(".")[0] in error["message"] or answer.status_code == 404


def test_a_client_that_leaves_ends_its_response(client, server):
    stream = client.responses.create(
        model="smollm2", input="Tell a long story.", stream=True, max_output_tokens=900, extra_body={"seed": 1}
    )
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    stream.close()
    deadline = time.monotonic() + 20
    while running(server):
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


def running(server):
    metrics = httpx.get(f"{server.url}/metrics").text
    return float(re.search(r"^atom:num_requests_running.* (\S+)$", metrics, re.MULTILINE)[1])
