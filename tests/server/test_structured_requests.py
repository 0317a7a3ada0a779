"""Structured output over HTTP, as the `openai` package asks for it."""

import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Tell me about Paris."}]


class City(BaseModel):
    name: str
    size: Literal["small", "large"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, **options):
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_tokens=200, seed=1, temperature=0.8, **options
    )
    return answer.choices[0].message.content


def test_the_clients_parse_gives_an_object(client):
    answer = client.chat.completions.parse(
        model="smollm2", messages=MESSAGES, response_format=City, temperature=0, max_tokens=300
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_json_object(client):
    messages = [{"role": "user", "content": 'Reply with exactly this JSON: {"ok": true}'}]
    answer = client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, max_tokens=300, response_format={"type": "json_object"}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"guided_grammar": 'root ::= "a"+ "."'}, r"a+\."),
        ({"guided_json": {"enum": [1, 2]}}, "1|2"),
        ({"structured_outputs": {"choice": ["x"]}}, "x"),
    ],
    ids=str,
)
def test_guides_of_vllm(client, extra, pattern):
    assert re.fullmatch(pattern, ask(client, extra_body=extra))


def test_a_stream_and_a_completion_keep_to_it(client):
    stream = client.completions.create(
        model="smollm2", prompt="A number: ", max_tokens=20, stream=True, extra_body={"guided_regex": "[0-9]{5}"}
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert re.fullmatch("[0-9]{5}", text)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 1}}}}, "response"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"guided_grammar": "root ::= x"}}, "guided_grammar"),
        ({"extra_body": {"guided_regex": "((a{1000}){1000}){1000}"}}, "structured_output"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "guided_regex"),
        ({"extra_body": {"structured_outputs": {"colour": "red"}}}, "structured_outputs"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_kept_is_refused_by_name(client, options, field):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert caught.value.param.startswith(field)
