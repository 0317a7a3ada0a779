"""Whatever a client sends gets an OpenAI-shaped answer below 500 that names the field, while others are served."""

import asyncio
import json
import ssl
import subprocess
import threading

import httpx
import pytest
from clients import make_client, stream_completion
from live import live_server

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"prompt": "Hi", "max_tokens": 2}
SURROGATE = b'{"prompt": "\\ud800", "max_tokens": 2}'
DEEP = b'{"prompt": "Hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def others_are_served(server):
    """A stream goes on while all of this file's requests come in."""
    results = []

    def run():
        async def stream():
            async with make_client(server.url) as client:
                return await stream_completion(client, [504, 3575], 400)

        results.append(asyncio.run(stream()))

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(120)
    assert results
    assert results[0][-1] == "[DONE]"


def refused(response: httpx.Response, status: int = 400) -> dict:
    assert response.status_code == status, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1200
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b'{"prompt": NaN}', b'{"prompt": "\xff"}', SURROGATE, DEEP],
    ids=lambda body: str(body[:30]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_bodies_that_are_no_request(client, path, body):
    refused(client.post(path, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1] * 5000}, "prompt"),
        ({"prompt": "word " * 100_000}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e400}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"logprobs": 1000}, "logprobs"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": ["x" * 100_000]}, "stop"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"logit_bias": {str(10**9): 1}}, "logit_bias"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"priority": 2**40}, "priority"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"echo": 1}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"cache_salt": "x" * 1000}, "cache_salt"),
        ({"guided_json": {"type": 5}}, "guided_json"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_fields_of_completions(client, change, field):
    body = json.dumps(TEXT | change).replace("Infinity", "1e999")
    error = refused(client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}))
    assert error["param"] in (field, f"{field}_strings")
    assert field in error["message"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 100_000}]}, "prompt"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_fields_of_chats(client, change, field):
    error = refused(
        client.post(
            "/v1/chat/completions", content=json.dumps(CHAT | change), headers={"Content-Type": "application/json"}
        )
    )
    assert field is None or error["param"] == field


def test_what_is_not_there(client):
    assert refused(client.post("/v1/completions", json=TEXT | {"model": "gpt-4"}), 404)["code"] == "model_not_found"
    refused(client.get("/v1/models/gpt-4"), 404)
    refused(client.get("/nothing"), 404)
    refused(client.get("/v1/completions"), 405)
    refused(client.post("/v1/completions", content=b"prompt=Hi"), 415)
    refused(client.post("/v1/embeddings", json={"input": "Hi"}))
    refused(client.post("/detokenize", json={"tokens": [10**9]}))
    too_long = refused(client.post("/v1/completions", json=TEXT | {"prompt": "a b c d " * 1000}))
    assert too_long["code"] == "context_length_exceeded"


def test_bodies_that_are_too_large(client):
    error = refused(client.post("/v1/completions", json=TEXT | {"prompt": "x" * 10_000_000}), 413)
    assert error["code"] == "request_too_large"

    def endless():
        for _ in range(200):
            yield b" " * 100_000

    try:
        response = client.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    except httpx.TransportError:
        return  # the server may end the connection while the client still sends
    refused(response, 413)


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server with keys, TLS, a short queue and little time."""
    folder = tmp_path_factory.mktemp("strict")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days",
         "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    flags = [
        "--api-key", "first-key", "--api-key", "second-key", "--cors-origins", "https://page.example",
        "--max-queue", "1", "--max-num-seqs", "1", "--request-timeout", "8", "--served-model-name", "tiny", "smol",
        "--ssl-keyfile", str(folder / "key.pem"), "--ssl-certfile", str(folder / "cert.pem"),
    ]  # fmt: skip
    with live_server(folder, *flags) as server:
        yield server.url, ssl.create_default_context(cafile=str(folder / "cert.pem"))


@pytest.fixture
def secure(strict):
    url, trust = strict
    with httpx.Client(base_url=url, verify=trust, timeout=60) as client:
        yield client


KEY = {"Authorization": "Bearer second-key"}


def test_keys(secure):
    for headers in ({}, {"Authorization": "Bearer first"}, {"Authorization": "Basic first-key"}, {"x-api-key": ""}):
        error = refused(secure.post("/v1/completions", json=TEXT, headers=headers), 401)
        assert error["code"] == "invalid_api_key"
    for headers in (KEY, {"Authorization": "bearer first-key"}, {"x-api-key": "first-key"}):
        assert secure.post("/v1/completions", json=TEXT, headers=headers).status_code == 200
    for path in ("/health", "/ping", "/version", "/metrics"):
        assert secure.get(path).status_code == 200
    refused(secure.get("/v1/models"), 401)
    refused(secure.post("/reset_prefix_cache"), 401)


def test_served_names(secure):
    assert [model["id"] for model in secure.get("/v1/models", headers=KEY).json()["data"]] == ["tiny", "smol"]
    for name in ("tiny", "smol"):
        assert secure.post("/v1/completions", json=TEXT | {"model": name}, headers=KEY).json()["model"] == name
    refused(secure.post("/v1/completions", json=TEXT | {"model": "smollm2"}, headers=KEY), 404)


def test_cors(secure):
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = secure.options("/v1/completions", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = secure.options("/v1/completions", headers=ask | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_and_a_slow_request(strict):
    async def run():
        url, trust = strict
        async with httpx.AsyncClient(base_url=url, verify=trust, timeout=60, headers=KEY) as client:
            body = {"prompt": [5], "max_tokens": 1000, "ignore_eos": True}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body | {"n": 12})) for _ in range(6)]
            return await asyncio.gather(*tasks)

    answers = asyncio.run(run())
    full = [answer for answer in answers if answer.status_code == 429]
    assert full
    assert all("Retry-After" in answer.headers for answer in full)
    assert {refused(answer, 429)["code"] for answer in full} == {"queue_full"}
    late = [answer for answer in answers if answer.status_code == 504]
    assert {refused(answer, 504)["code"] for answer in late} == {"timeout"}
