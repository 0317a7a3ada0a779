"""Calls that a request demands: the schema that holds answers to them, and how these are read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from atom.entrypoints.openai.parsers.forced_tools import forced_tool_parser, schema_for
from atom.entrypoints.openai.protocol import ChatCompletionRequest
from atom.model_engine.structured_output import grammar_of
from atom.utils.errors import RequestError

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/node"}, "default": {"$ref": "#/$defs/node"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"node": {"type": "integer"}},
}
OTHER = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/node"}},
    "required": ["a"],
    "$defs": {"node": {"enum": ["#/$defs/node"]}},
}
NAMED = {"type": "function", "function": {"name": "add"}}


def request(tool_choice, **fields):
    tools = [("add", PARAMETERS), ("tell", OTHER), ("now", None)]
    return ChatCompletionRequest.model_validate(
        {
            "messages": [{"role": "user", "content": "hi"}],
            "tools": [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in tools],
            "tool_choice": tool_choice,
            **fields,
        }
    )


def accepts(schema, value):
    matcher = LLMatcher(LLTokenizer("byte"), grammar_of({"json": schema}))
    text = list(json.dumps(value).encode())
    return matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()


def parse(wish, *pieces):
    parser = forced_tool_parser(wish)
    content, calls = "", []
    for step in [*(lambda p=piece: parser.push(p) for piece in pieces), parser.flush]:
        text, deltas = step()
        content += text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.name, ""])
            calls[-1][1] += delta.arguments
    return content, [tuple(call) for call in calls]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_nothing_is_demanded(choice):
    assert schema_for(request(choice)) is None
    assert forced_tool_parser(request(choice)) is None


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ([{"name": "add", "parameters": {"a": 1}}], True),
        ([{"name": "add", "parameters": {"a": 1, "default": 2}}, {"name": "now", "parameters": {}}], True),
        ([{"name": "tell", "parameters": {"a": "#/$defs/node"}}], True),
        ([{"name": "tell", "parameters": {"a": 1}}], False),
        ([{"name": "add", "parameters": {"a": "x"}}], False),
        ([{"name": "subtract", "parameters": {}}], False),
        ([{"name": "add"}], False),
        ([], False),
        ({"name": "now", "parameters": {}}, False),
    ],
)
def test_required_takes_the_tools_and_no_others(value, fits):
    assert accepts(schema_for(request("required")), value) is fits


def test_without_parallel_calls_there_is_one():
    schema = schema_for(request("required", parallel_tool_calls=False))
    call = {"name": "now", "parameters": {}}
    assert accepts(schema, [call])
    assert not accepts(schema, [call, call])


def test_schemas_nested_too_deeply_are_refused():
    deep = {}
    for _ in range(2000):
        deep = {"items": deep}
    wish = request("required")
    wish.tools[0].function.parameters = deep
    with pytest.raises(RequestError, match="the parameters of 'add' are nested too deeply"):
        schema_for(wish)


def test_a_named_tool_takes_its_arguments():
    schema = schema_for(request(NAMED))
    assert schema == PARAMETERS
    assert accepts(schema, {"a": 1})
    assert not accepts(schema, {"a": "x"})
    assert schema_for(request({"type": "function", "function": {"name": "now"}})) == {"type": "object"}


objects = st.dictionaries(
    st.text('ab]}{"\\,\n', max_size=4), st.text('[]{}"\\', max_size=4) | st.integers(), max_size=3
)


@given(
    calls=st.lists(st.tuples(st.sampled_from(["add", "now"]), objects.map(json.dumps)), min_size=1, max_size=3),
    indent=st.sampled_from(["", "\n  "]),
    size=st.integers(1, 40),
)
def test_required_is_read_however_it_is_split(calls, indent, size):
    written = [f'{{{indent}"name": "{name}",{indent}"parameters": {args}}}' for name, args in calls]
    text = f"{indent}[{indent}{f',{indent}'.join(written)}]{indent}"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert parse(request("required"), *pieces) == ("", calls)
    assert parse(request("required"), text) == ("", calls)


@given(arguments=objects.map(json.dumps), size=st.integers(1, 40))
def test_a_named_tool_is_read_however_it_is_split(arguments, size):
    pieces = [arguments[i : i + size] for i in range(0, len(arguments), size)]
    assert parse(request(NAMED), "\n", *pieces, "\n") == ("", [("add", arguments)])


def test_a_named_tools_arguments_are_streamed():
    parser = forced_tool_parser(request(NAMED))
    _, (first,) = parser.push('{"a')
    assert (first.name, first.arguments) == ("add", '{"a')
    _, (second,) = parser.push('": 1}')
    assert (second.name, second.arguments) == (None, '": 1}')


@pytest.mark.parametrize(
    ("choice", "text", "content", "calls"),
    [
        ("required", '[{"name": "add", "parameters": {"a"', "", [("add", '{"a"')]),
        ("required", '[{"name": "ad', '[{"name": "ad', []),
        ("required", "sorry", "sorry", []),
        ("required", '[{"name": "now", "parameters": {}}, oops', ", oops", [("now", "{}")]),
        ("required", '[{"name": "now", "parameters": {}}] and', "and", [("now", "{}")]),
        (NAMED, '{"a": ', "", [("add", '{"a": ')]),
        (NAMED, "sorry", "sorry", []),
        (NAMED, '{"a": 1} and', "and", [("add", '{"a": 1}')]),
        (NAMED, "", "", []),
    ],
)
def test_answers_that_are_cut_or_were_not_held(choice, text, content, calls):
    assert parse(request(choice), text) == (content, calls)
    assert parse(request(choice), *text) == (content, calls)
