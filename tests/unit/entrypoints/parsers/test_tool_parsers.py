"""Tool calls in the text of models: every format, however the text is split, whole or broken."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from atom.entrypoints.openai.deltas import ToolCallDelta
from atom.entrypoints.openai.parsers import TOOL_PARSERS, get_tool_parser
from atom.entrypoints.openai.protocol import ChatCompletionRequest
from atom.utils.errors import ConfigError

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"  # noqa: RUF001

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "ratio": {"type": "number"},
        "tags": {"type": "array"},
        "place": {"$ref": "#/$defs/place"},
        "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "kind": {"enum": [1, 2]},
    },
    "$defs": {"place": {"type": "object"}},
}
REQUEST = ChatCompletionRequest.model_validate(
    {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [
            {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
            {"type": "function", "function": {"name": "now"}},
        ],
    }
)


def parse(name, *pieces):
    """(content, [(name, arguments), ...]) of text in pieces."""
    parser = get_tool_parser(name, None)(REQUEST, "")
    content, calls = "", []
    for step in [*(lambda p=piece: parser.push(p) for piece in pieces), parser.flush]:
        text, deltas = step()
        content += text
        for delta in deltas:
            assert isinstance(delta, ToolCallDelta)
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.name, ""])
            else:
                assert delta.index == len(calls) - 1
                assert delta.arguments
            calls[-1][1] += delta.arguments
    return content, [tuple(call) for call in calls]


def split(text, cuts):
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# How each format writes (name, arguments as JSON text) pairs.


def hermes(calls):
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>' for name, args in calls)


def llama3(calls):
    return "<|python_tag|>" + "; ".join(f'{{"name": "{name}", "parameters": {args}}}' for name, args in calls)


def mistral_array(calls):
    return "[TOOL_CALLS][" + ", ".join(f'{{"name": "{name}", "arguments": {args}}}' for name, args in calls) + "]"


def mistral_named(calls):
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{args}" for name, args in calls)


def deepseek_v3(calls):
    parts = [f"{CALL}function{SEP}{name}\n```json\n{args}\n```{CALL_END}" for name, args in calls]
    return BEGIN + "\n".join(parts) + END


def deepseek_v31(calls):
    return BEGIN + "".join(f"{CALL}{name}{SEP}{args}{CALL_END}" for name, args in calls) + END


def qwen3_coder(calls):
    text = ""
    for name, args in calls:
        text += f"<tool_call>\n<function={name}>\n"
        for key, value in json.loads(args).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            text += f"<parameter={key}>\n{shown}\n</parameter>\n"
        text += "</function>\n</tool_call>\n"
    return text


def glm45(calls):
    text = ""
    for name, args in calls:
        text += f"<tool_call>{name}\n"
        for key, value in json.loads(args).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            text += f"<arg_key>{key}</arg_key>\n<arg_value>{shown}</arg_value>\n"
        text += "</tool_call>\n"
    return text


JSON_FORMATS = [
    ("hermes", hermes),
    ("llama3_json", llama3),
    ("mistral", mistral_array),
    ("mistral", mistral_named),
    ("deepseek_v3", deepseek_v3),
    ("deepseek", deepseek_v31),
]
TEXT_FORMATS = [("qwen3_coder", qwen3_coder), ("glm45", glm45)]
MARKERS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", BEGIN, END, CALL, CALL_END, SEP,
    "<function=f>", "</function>", "<parameter=k>", "<arg_key>", "</arg_key>", "<arg_value>", "```", "```json\n",
]  # fmt: skip
NASTY = [*MARKERS, '{"', "}", "]", '"', "\\", "\n", "; {", "é😀", "\u2028", "</", "<tool"]
texts = st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec="utf-8"), max_size=4)), max_size=6).map(
    "".join
)
values = st.recursive(
    st.one_of(texts, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
names = st.sampled_from(["get_weather", "now", "a.b-c_1"])
objects = st.builds(json.dumps, st.dictionaries(texts, values, max_size=3), ensure_ascii=st.booleans())
calls_in_json = st.lists(st.tuples(names, objects), min_size=1, max_size=3)
typed = st.fixed_dictionaries(
    {},
    optional={
        "city": texts.filter(lambda text: "</parameter>" not in text),
        "days": st.integers(),
        "exact": st.booleans(),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "tags": st.lists(st.integers() | st.text("ab{}", max_size=3)),
        "place": st.dictionaries(st.text("xy", max_size=2), st.integers()),
        "unit": st.none() | st.just("celsius"),
        "kind": st.sampled_from([1, 2]),
    },
)
calls_in_text = st.lists(st.tuples(st.just("get_weather"), typed.map(json.dumps)), min_size=1, max_size=3)
cuts = st.lists(st.integers(0, 10_000), max_size=12)


@pytest.mark.parametrize(("name", "write"), JSON_FORMATS)
@settings(max_examples=60, deadline=None)
@given(calls=calls_in_json, cuts=cuts, content=st.sampled_from(["", "I look it up."]))
def test_calls_come_out_as_they_were_written(name, write, calls, cuts, content):
    text = content + ("\n" if content else "") + write(calls)
    assert parse(name, *split(text, cuts)) == (content, calls)
    assert parse(name, *text) == (content, calls)


@pytest.mark.parametrize(("name", "write"), TEXT_FORMATS)
@settings(max_examples=80, deadline=None)
@given(calls=calls_in_text, cuts=cuts, content=st.sampled_from(["", "I look it up."]))
def test_arguments_written_as_text_become_json_of_their_types(name, write, calls, cuts, content):
    text = content + write(calls)
    found_content, found = whole = parse(name, text)
    assert found_content == content
    assert [(name, json.loads(args)) for name, args in found] == [(name, json.loads(args)) for name, args in calls]
    assert parse(name, *split(text, cuts)) == whole
    assert parse(name, *text) == whole


KEYWORDS = [
    '"name"',
    '"arguments"',
    '"parameters"',
    ": ",
    '"now"',
    "now",
    "{",
    "{}",
    "[",
    ",",
    ";",
    "function",
    " ",
    ">",
]
soups = st.lists(
    st.one_of(st.sampled_from([*NASTY, *KEYWORDS, *(["<tool_call>"] * 3)]), st.integers(10, 99).map("w{}".format)),
    max_size=20,
).map("".join)


@pytest.mark.parametrize("name", sorted(set(TOOL_PARSERS) - {"llama3", "deepseek", "deepseek_v31"}))
@settings(max_examples=300, deadline=None)
@given(text=soups, cuts=cuts)
def test_broken_text_is_never_lost_and_never_raises(name, text, cuts):
    whole = content, calls = parse(name, text)
    assert parse(name, *split(text, cuts)) == whole
    assert parse(name, *text) == whole
    everything = content + "".join(map("".join, calls))
    for word in re.findall(r"w\d\d", text):
        assert everything.count(word) == text.count(word)
    if not calls:
        assert content == text


@pytest.mark.parametrize(("name", "write"), [*JSON_FORMATS, *TEXT_FORMATS])
def test_a_call_cut_anywhere(name, write):
    """max_tokens may end the text at each place: it is content until the arguments begin, then cut arguments."""
    arguments = '{"city": "Paris", "tags": ["a", "b"]}'
    text = write([("get_weather", arguments), ("now", "{}")])
    for end in range(len(text)):
        content, calls = parse(name, *text[:end])
        assert (content, calls) == parse(name, text[:end])
        if not calls:
            assert content == text[:end]
            continue
        assert calls[0][0] == "get_weather"
        assert arguments.startswith(calls[0][1])
        if len(calls) == 2:
            assert calls[0][1] == arguments
            assert calls[1][0] == "now"


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "no calls <tool_cal at all", "no calls <tool_cal at all", []),
        ("hermes", "\n\nwords \n", "\n\nwords \n", []),
        ("hermes", 'a\n<tool_call>{"name": "now"}</tool_call>\nb', "ab", [("now", "{}")]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', "", [("now", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}</tool_call>', "", [("now", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_', "", [("now", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": <1}}</tool_call>x', "<1}}x", [("now", '{"a": ')]),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', []),
        ("hermes", '<tool_call><tool_call>{"name": "now"}</tool_call>', "<tool_call>", [("now", "{}")]),
        ("hermes", '<tool_call>{"answer": 1}</tool_call>', '<tool_call>{"answer": 1}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "\\ud800"', '<tool_call>{"name": "\\ud800"', []),
        ("llama3", '{"name": "now", "parameters": {}}', "", [("now", "{}")]),
        ("llama3", '\n{"name": "now", "parameters": {}};\n{"name": "now"}', "", [("now", "{}")] * 2),
        ("llama3", '{"type": "function", "name": "now", "parameters": {}}', "", [("now", "{}")]),
        ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
        ("llama3", '{"answer": {"name": "now"}}', '{"answer": {"name": "now"}}', []),
        ("llama3", 'Use {"name": "now", "parameters": {}}', 'Use {"name": "now", "parameters": {}}', []),
        ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}] end', "end", [("now", "{}")]),
        ("mistral", '[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{"a": 1}', "", [("now", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS]now{"a": 1}', "", [("now", '{"a": 1}')]),
        ("mistral", "[TOOL_CALLS]well, not", "[TOOL_CALLS]well, not", []),
        ("deepseek", f"{BEGIN}{CALL}now{SEP}{CALL_END}{END}", "", [("now", "{}")]),
        ("deepseek", f"a{CALL}now{SEP}{{}}{CALL_END}", "a", [("now", "{}")]),
        ("qwen3_coder", "<function=now>\n</function>", "", [("now", "{}")]),
        (
            "qwen3_coder",
            "<tool_call>\n<function=x>\n<parameter=a>1\n</parameter></function>",
            "",
            [("x", '{"a": "1"}')],
        ),
        ("qwen3_coder", "<tool_call>no</tool_call>", "<tool_call>no</tool_call>", []),
        (
            "qwen3_coder",
            "<function=get_weather><parameter=exact>True</parameter><parameter=days>soon</parameter></function>",
            "",
            [("get_weather", '{"exact": true, "days": "soon"}')],
        ),
        ("glm45", "<tool_call>now\n</tool_call>", "", [("now", "{}")]),
        ("glm45", "<tool_call>now</tool_call>\n<tool_call>now</tool_call>", "", [("now", "{}")] * 2),
    ],
)
def test_particular_texts(name, text, content, calls):
    assert parse(name, text) == (content, calls)
    assert parse(name, *text) == (content, calls)


def test_arguments_are_streamed_as_they_come():
    parser = get_tool_parser("hermes", None)(REQUEST, "")
    assert parser.push('Yes.\n<tool_call>{"name": "now", ') == ("Yes.", [])
    assert parser.push('"arguments": {"a') == ("", [ToolCallDelta(0, None, "now", '{"a')])
    assert parser.push('": [1') == ("", [ToolCallDelta(0, None, None, '": [1')])
    assert parser.push("]}}</tool_call>") == ("", [ToolCallDelta(0, None, None, "]}")])
    assert parser.flush() == ("", [])


def test_text_strings_are_streamed_as_json():
    parser = get_tool_parser("qwen3_coder", None)(REQUEST, "")
    assert parser.push('<function=get_weather>\n<parameter=city>\nNew "Y')[1][0].arguments == '{"city": "New \\"Y'
    assert parser.push("ork\n")[1][0].arguments == "ork"
    assert parser.push("</parameter>\n<parameter=days>\n1")[1][0].arguments == '", "days": '
    assert parser.push("2\n</parameter>")[1][0].arguments == "12"
    assert parser.push("</function>")[1][0].arguments == "}"


def test_deltas_fill_the_types_of_the_client():
    parser = get_tool_parser("mistral", None)(REQUEST, "")
    _, (delta,) = parser.push('[TOOL_CALLS][{"name": "now", "arguments": {}}]')
    assert re.fullmatch("[a-z0-9]{9}", delta.id)  # the only ids that Mistral's templates take
    function = {"name": delta.name, "arguments": delta.arguments}
    ChoiceDeltaToolCall.model_validate({"index": delta.index, "id": delta.id, "type": "function", "function": function})
    ChatCompletionMessageFunctionToolCall.model_validate({"id": delta.id, "type": "function", "function": function})


def test_mistrals_own_ids_are_kept():
    parser = get_tool_parser("mistral", None)(REQUEST, "")
    _, (delta,) = parser.push('[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{"a": 1}')
    assert delta.id == "abcdef123"


def test_what_is_held_back_is_bounded():
    parser = get_tool_parser("hermes", None)(REQUEST, "")
    shown = parser.push('<tool_call>{"arguments": {"a": "')[0]
    for _ in range(100):
        shown += parser.push("x" * 1000)[0]
    assert len(shown) > 30_000
    assert len(shown + parser.flush()[0]) == 100_000 + len('<tool_call>{"arguments": {"a": "')


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"tool_call_parser 'herms' is unknown; .*hermes, llama3, llama3_json"):
        get_tool_parser("herms", None)


def test_which_formats_need_special_tokens_shown():
    backend = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    backend.add_tokens(["<tool_call>"])
    backend.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert get_tool_parser("mistral", tokenizer).needs_special_tokens
    assert not get_tool_parser("hermes", tokenizer).needs_special_tokens
    assert not get_tool_parser("mistral", None).needs_special_tokens


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": "array"}, "[1, ", "[1, "),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, " 1e3 ", 1000.0),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5.5", "5.5"),
        ({"$ref": "#/properties/a"}, "5", "5"),
        ({"$ref": "#/nowhere/at/all"}, "5", "5"),
        ({"anyOf": [{"$ref": "#/properties/a"}] * 50 + [{"const": True}]}, "true", True),
        ({"type": 5, "enum": 5, "anyOf": 5}, "5", "5"),
        (5, "5", "5"),
    ],
)
def test_values_take_the_types_of_any_schema(schema, value, expected):
    request = REQUEST.model_copy(deep=True)
    request.tools[0].function.parameters = {"properties": {"a": schema}}
    parser = get_tool_parser("glm45", None)(request, "")
    text = f"<tool_call>get_weather<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>"
    _, (call,) = parser.push(text)
    assert json.loads(call.arguments) == {"a": expected}


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_every_name_makes_a_parser(name):
    assert parse(name, "Hello", " world") == ("Hello world", [])
