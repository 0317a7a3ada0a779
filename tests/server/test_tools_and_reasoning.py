"""Tool calls and reasoning over HTTP, as the `openai` package asks for them."""

import json

import openai
import pytest
from live import live_server

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "About the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("get_weather", "get_rain")
]
MESSAGES = [{"role": "user", "content": "What will the weather in Paris be?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The template prints what it was told, and opens the reasoning where that is asked for."""
    folder = tmp_path_factory.mktemp("tools")
    template = folder / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if think %}<think>\n{% elif silent %}<think>\n\n</think>\n\n{% endif %}"
    )
    flags = ["--chat-template", str(template), "--reasoning-parser", "qwen3", "--tool-call-parser", "hermes"]
    with (
        live_server(folder, *flags, "--max-num-seqs", "8") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client, kwargs=None, **options):
    body = {"chat_template_kwargs": kwargs or {"silent": True}} | options.pop("extra_body", {})
    options = {"max_tokens": 200, "seed": 1, "temperature": 0.7} | options
    return client.chat.completions.create(model="smollm2", messages=MESSAGES, extra_body=body, **options)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_rain"}}], ids=str)
def test_a_demanded_call_is_made(client, choice):
    answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name in ("get_weather", "get_rain")
    if choice != "required":
        assert call.function.name == "get_rain"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    assert not answer.message.content


def test_a_demanded_call_streams(client):
    name, arguments = "", ""
    with ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, stream=True) as stream:
        for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    whole = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls[0]
    assert (name, arguments) == (whole.function.name, whole.function.arguments)


def test_a_call_that_the_model_chooses_to_make(client):
    call = '<tool_call>\n{"name": "get_rain", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
    answer = ask(client, tools=TOOLS, extra_body={"guided_choice": [call]}).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls[0].function.name == "get_rain"
    assert json.loads(answer.message.tool_calls[0].function.arguments) == {"city": "Oslo", "days": 3}
    ignored = ask(client, tools=TOOLS, tool_choice="none", extra_body={"guided_choice": [call]}).choices[0]
    assert ignored.message.tool_calls is None
    assert ignored.message.content == call


def test_reasoning_is_told_apart(client):
    text = "<think>\nhm\n</think>\n\nYes."
    message = ask(client, extra_body={"guided_choice": [text]}).choices[0].message
    assert message.content == text  # the prompt has closed the reasoning: this is what the answer says
    message = ask(client, {"think": True}, extra_body={"guided_choice": ["Yes."]}, max_tokens=100).choices[0].message
    if message.content:  # the model ended its thought in time
        assert message.content.strip() == "Yes."
    assert message.reasoning_content


def test_a_structure_holds_without_reasoning_too(client):
    # Nothing opens the reasoning: the answer may do so itself, or begin at once.
    options = {"extra_body": {"guided_choice": ["Yes.", "No."]}, "max_tokens": 400}
    message = ask(client, {"x": 1}, **options).choices[0].message
    assert message.content in ("Yes.", "No.", "")
    assert message.content or message.reasoning_content


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strnig"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
    ids=["no tools", "unknown tool", "wrong schema"],
)
def test_wrong_demands_are_refused(client, options, field):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert caught.value.param == field


@pytest.mark.parametrize("kwargs", [{"think": True}, {"x": 1}], ids=["opened", "open to choice"])
def test_a_demanded_call_follows_reasoning(client, kwargs):
    answer = ask(client, kwargs, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=100)
    choice = answer.choices[0]
    if choice.finish_reason == "length":  # lost in thought
        assert choice.message.reasoning_content
        assert not choice.message.content
    else:
        assert json.loads(choice.message.tool_calls[0].function.arguments)
