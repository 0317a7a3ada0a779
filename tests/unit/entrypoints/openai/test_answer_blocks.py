"""Deltas of an answer as blocks, as the events of Responses and of Messages, and the conversations they come from."""

import json

import pytest

from atom.entrypoints.openai.blocks import Blocks
from atom.entrypoints.openai.deltas import ChatAnswer, ChatDelta, ToolCallDelta
from atom.entrypoints.openai.messages_events import MessageEvents, content_of, stop_of
from atom.entrypoints.openai.messages_protocol import MessagesRequest
from atom.entrypoints.openai.responses_events import ResponseEvents, output_of
from atom.entrypoints.openai.responses_protocol import ResponsesRequest
from atom.entrypoints.openai.responses_store import ResponseStore
from atom.utils.errors import RequestError

# Thinks, speaks, calls twice; the end of the first call comes with text that follows it.
DELTAS = [
    ChatDelta(0, reasoning_content="Rome"),
    ChatDelta(0, reasoning_content="?", content="I "),
    ChatDelta(0, content="look", tool_calls=[ToolCallDelta(0, "call_a", "weather", '{"city":')]),
    ChatDelta(0),
    ChatDelta(0, content="and", tool_calls=[ToolCallDelta(0, arguments=' "Rome"}')]),
    ChatDelta(0, tool_calls=[ToolCallDelta(1, "call_b", "time"), ToolCallDelta(1, arguments="{}")]),
    ChatDelta(0, finish_reason="tool_calls"),
]
BLOCKS = [
    ("reasoning", "Rome?"), ("text", "I look"), ("call", '{"city": "Rome"}'), ("text", "and"), ("call", "{}"),
]  # fmt: skip


def events_of(data):
    """[(event, data)]"""
    events = []
    for part in data.decode().strip().split("\n\n"):
        name, body = part.split("\n")
        body = json.loads(body.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        events.append(body)
    return events


def test_blocks_follow_each_other():
    blocks, changes = Blocks(), []
    for delta in DELTAS:
        changes += blocks.take(delta)
    changes += blocks.close()
    assert [(block.kind, block.text) for block in blocks.all] == BLOCKS
    assert [(block.call_id, block.name) for block in blocks.all if block.kind == "call"] == [
        ("call_a", "weather"),
        ("call_b", "time"),
    ]
    open_index = None
    for change in changes:
        if change.kind == "start":
            assert open_index is None
            open_index = change.block.index
        assert change.block.index == open_index
        if change.kind == "stop":
            open_index = None
    assert open_index is None


def test_blocks_without_reasoning():
    answer = ChatAnswer(0, content="a", reasoning_content="b")
    assert [block.kind for block in Blocks.of(answer, with_reasoning=False)] == ["text"]


def test_events_of_a_response():
    events = ResponseEvents()
    data = b"".join(events.delta(delta) for delta in DELTAS)
    told = events_of(data)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    around = {
        "reasoning": ("response.content_part.added", "reasoning_text", "response.content_part.done"),
        "text": ("response.content_part.added", "output_text", "response.content_part.done"),
        "call": (None, "function_call_arguments", None),
    }
    kinds = [event["type"] for event in told]
    for index, (kind, text) in enumerate(BLOCKS):
        first, name, last = around[kind]
        mine = [event for event in told if event["output_index"] == index]
        deltas = [event["delta"] for event in mine if event["type"] == f"response.{name}.delta"]
        assert "".join(deltas) == text
        assert [event["type"] for event in mine] == [
            "response.output_item.added",
            *([first] if first else []),
            *[f"response.{name}.delta"] * len(deltas),
            f"response.{name}.done",
            *([last] if last else []),
            "response.output_item.done",
        ]
        assert mine[-1]["item"] == events.output[index]
        assert {event.get("item_id") or event["item"]["id"] for event in mine} == {events.output[index]["id"]}
    assert kinds.count("response.output_item.done") == len(BLOCKS)
    assert events.output[2]["arguments"] == '{"city": "Rome"}'
    assert events.finish_reason == "tool_calls"
    assert events.reasoning == "Rome?"


def test_an_empty_response_has_a_message():
    events = ResponseEvents()
    told = events_of(events.delta(ChatDelta(0, finish_reason="length")))
    assert told[0]["type"] == "response.output_item.added"
    assert events.output[0]["status"] == "incomplete"
    assert output_of(ChatAnswer(0, finish_reason="length"))[0]["content"][0]["text"] == ""


def test_streamed_and_whole_items_are_the_same():
    events, answer = ResponseEvents(), ChatAnswer(0)
    for delta in DELTAS:
        if not delta.content.startswith("and"):  # text between calls: a whole answer has it before them
            events.delta(delta)
            answer.add(delta)
    events.output[2]["arguments"] = answer.tool_calls[0].arguments = "{}"  # its end was left out with the text
    streamed, whole = ([item | {"id": ""} for item in items] for items in (events.output, output_of(answer)))
    assert streamed == whole


def test_events_of_a_message():
    events = MessageEvents(with_thinking=True)
    told = events_of(b"".join(events.delta(delta) for delta in DELTAS))
    keys = {"reasoning": "thinking", "text": "text", "call": "partial_json"}
    for index, (kind, text) in enumerate(BLOCKS):
        mine = [event for event in told if event["index"] == index]
        assert mine[0]["type"] == "content_block_start"
        assert mine[-1]["type"] == "content_block_stop"
        assert "".join(event["delta"][keys[kind]] for event in mine[1:-1]) == text
    assert [e["content_block"]["type"] for e in told if e["type"] == "content_block_start"] == [
        "thinking", "text", "tool_use", "text", "tool_use",
    ]  # fmt: skip
    assert stop_of(events.last) == {"stop_reason": "tool_use", "stop_sequence": None}


def test_content_of_a_message():
    answer = ChatAnswer(0)
    for delta in DELTAS:
        answer.add(delta)
    assert content_of(answer, with_thinking=True) == [
        {"type": "thinking", "thinking": "Rome?", "signature": ""},
        {"type": "text", "text": "I lookand", "citations": None},
        {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Rome"}},
        {"type": "tool_use", "id": "call_b", "name": "time", "input": {}},
    ]
    cut = ChatAnswer(0, tool_calls=[ToolCallDelta(0, "a", "b", '{"c": ')], finish_reason="length")
    assert content_of(cut, with_thinking=True)[0]["input"] == {}
    assert stop_of(cut)["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "expected"),
    [
        ("stop", None, ("end_turn", None)),
        ("stop", 2, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
        ("tool_calls", None, ("tool_use", None)),
    ],
)
def test_stop_reasons(finish_reason, stop_reason, expected):
    assert tuple(stop_of(ChatDelta(0, finish_reason=finish_reason, stop_reason=stop_reason)).values()) == expected


def plain(messages):
    return [message.model_dump(exclude_none=True) for message in messages]


CALL = {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?\nIn Rome."},
    {"role": "assistant", "content": "I look.", "reasoning_content": "Rome", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_a", "name": "weather"},
    {"role": "user", "content": "So?"},
]


def test_a_response_request_as_a_chat():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}, {"type": "text", "text": "In Rome."}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Rome"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "call_a", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "call_a", "output": "sunny"},
        {"role": "user", "content": "So?"},
    ]
    request = ResponsesRequest(input=items, instructions="Be brief.", reasoning={"effort": "none"}, temperature=0.5)
    chat, conversation = request.chat([])
    assert plain(chat.messages) == CHAT
    assert plain(conversation) == CHAT[1:]
    assert (chat.temperature, chat.chat_template_kwargs["enable_thinking"]) == (0.5, False)


def test_instructions_join_a_system_message():
    request = ResponsesRequest(input=[{"role": "developer", "content": "b"}, {"role": "user", "content": "c"}])
    request.instructions = "a"
    chat, _ = request.chat([])
    assert plain(chat.messages) == [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "c"}]


def test_a_message_request_as_a_chat():
    use = {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Rome"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "user", "content": "In Rome."},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Rome"}, {"type": "text", "text": "I look."}, use],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_a", "content": "sunny"},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    tools = [{"name": "weather", "input_schema": {"type": "object"}}]
    options = {"max_tokens": 5, "tools": tools, "stop_sequences": ["x"], "top_k": 3}
    request = MessagesRequest(
        messages=messages, system="Be brief.", tool_choice={"type": "tool", "name": "weather"}, **options
    )
    chat = request.chat()
    assert plain(chat.messages) == CHAT
    assert (chat.max_completion_tokens, chat.stop, chat.top_k) == (5, ["x"], 3)
    assert chat.tool_choice.function.name == chat.tools[0].function.name == "weather"
    assert chat.chat_template_kwargs["enable_thinking"] is False
    thinking = MessagesRequest(messages=messages, max_tokens=5, thinking={"type": "enabled", "budget_tokens": 1024})
    assert thinking.chat().chat_template_kwargs["enable_thinking"] is True


def test_failed_tools_are_told():
    result = {"type": "tool_result", "tool_use_id": "a", "content": "no such city", "is_error": True}
    request = MessagesRequest(messages=[{"role": "user", "content": [result]}], max_tokens=5)
    assert request.chat().messages[0].content == "Error: no such city"


@pytest.mark.parametrize("kind", ["image", "document", "server_tool_use", "x" * 5000])
def test_blocks_that_are_not_text_are_refused(kind):
    request = MessagesRequest(messages=[{"role": "user", "content": [{"type": kind}]}], max_tokens=5)
    with pytest.raises(RequestError, match=r"messages\[0\].content\[0\]: type '"):
        request.chat()


def test_the_store_keeps_the_most_recently_used():
    _, conversation = ResponsesRequest(input="hi").chat([])
    store = ResponseStore(max_responses=2)
    store.put({"id": "a"}, conversation)
    store.put({"id": "b"}, conversation)
    assert store.get("a").messages() == conversation
    store.put({"id": "c"}, conversation)
    assert [store.get(name) is not None for name in "abc"] == [True, False, True]
    assert store.remove("a")
    assert not store.remove("a")
    assert len(store) == 1


def test_the_store_is_bounded_in_bytes():
    _, conversation = ResponsesRequest(input="x" * 400).chat([])
    store = ResponseStore(max_bytes=1000)
    for name in "abcd":
        store.put({"id": name}, conversation)
    assert len(store) == 2
    _, huge = ResponsesRequest(input="x" * 2000).chat([])
    store.put({"id": "e"}, huge)
    assert len(store) == 0
    store.put({"id": "f"}, conversation)
    assert store.get("f") is not None
