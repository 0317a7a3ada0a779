"""How the server ends, what it survives, and that nothing it started outlives it."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from clients import eventually, gauge, make_client, stream_completion, token_ids
from live import live_server
from tiny_models import make_checkpoint

FLAGS = ("--max-num-seqs", "16", "--max-model-len", "256", "--load_dummy")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random weights and no tokenizer: prompts are token ids."""
    return str(make_checkpoint("llama", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny):
    """A server that these tests only use, until the last one ends it."""
    with live_server(
        tmp_path_factory.mktemp("shared"), *FLAGS, "--log-requests", "--read-timeout", "1", model=tiny
    ) as server:
        yield server


@pytest.fixture(scope="module")
def restarting(tmp_path_factory, tiny):
    """A server whose core may die, until a test ends it."""
    flags = ("--restart-engine", "--shutdown-grace", "60")
    with live_server(tmp_path_factory.mktemp("restarting"), *FLAGS, *flags, model=tiny) as server:
        yield server


@pytest.fixture
def serve(tmp_path, tiny):
    return lambda *flags: live_server(tmp_path, *FLAGS, *flags, model=tiny)


def core_of(server) -> psutil.Process:
    (core,) = psutil.Process(server.process.pid).children(recursive=True)
    return core


def prompt(i: int) -> list[int]:
    return [3 + i % 90, 5, 7 * i % 120 + 1]


async def is_idle(client) -> bool:
    """No request runs or waits, and no block is in use."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return not any([await gauge(client, name) for name in names])


async def first_token_of(client, **fields):
    """A long stream, under way."""
    begun = asyncio.Event()
    task = asyncio.create_task(stream_completion(client, prompt(0), 200, begun, **fields))
    await begun.wait()
    return task


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [(signal.SIGTERM, 0, ""), (signal.SIGTERM, 0, "platform: "), (signal.SIGKILL, -signal.SIGKILL, "")],
    ids=["SIGTERM importing", "SIGTERM loading", "SIGKILL importing"],
)
def test_a_signal_while_it_starts_ends_it(tiny, tmp_path, number, code, moment):
    """moment: what the core has logged by then."""
    command = [sys.executable, "-m", "atom.entrypoints.openai_server", "--model", tiny, "--server-port", "0", *FLAGS]
    log = tmp_path / "log"
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        deadline = time.monotonic() + 60
        while not (cores := psutil.Process(process.pid).children(recursive=True)) or moment not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == code
    assert "Traceback" not in log.read_text()
    assert not psutil.wait_procs(cores, timeout=5)[1]


def test_a_killed_core_fails_its_requests_and_comes_back(restarting):
    async def run(server):
        async with make_client(server.url) as client:
            expected = token_ids(await stream_completion(client, prompt(1), 20, return_token_ids=True))
            begun = asyncio.Event()
            tasks = [asyncio.create_task(stream_completion(client, prompt(i), 240, begun)) for i in range(8)]
            await begun.wait()
            core_of(server).send_signal(signal.SIGKILL)
            killed = time.monotonic()
            ends = [events[-1] for events in await asyncio.gather(*tasks)]
            assert time.monotonic() - killed < 2
            failed = [end for end in ends if end != "[DONE]"]
            assert failed
            assert all(end["error"]["code"] == "engine_dead" for end in failed)
            health = await client.get("/health")
            assert health.status_code == 503
            refused = await client.post("/v1/completions", json={"prompt": [1], "max_tokens": 1})
            assert refused.status_code == 503
            assert "Retry-After" in refused.headers

            async def is_healthy():
                return (await client.get("/health")).status_code == 200

            await eventually(is_healthy, 60)
            again = token_ids(await stream_completion(client, prompt(1), 20, return_token_ids=True))
            assert again == expected

    asyncio.run(run(restarting))


def test_a_second_signal_ends_it_at_once(restarting):
    async def run(server):
        async with make_client(server.url) as client:
            task = await first_token_of(client, stream=True)
            server.process.send_signal(signal.SIGSTOP)  # so that both signals are pending when it goes on
            server.process.send_signal(signal.SIGINT)
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGCONT)
            with pytest.raises(httpx.TransportError):
                await task

    core = core_of(restarting)
    asyncio.run(run(restarting))
    assert restarting.process.wait(10) in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    psutil.wait_procs([core], timeout=10)
    assert not core.is_running()


def test_without_a_restart_it_stays_ill_but_answers(serve):
    with serve() as server:
        core_of(server).send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 5
        while httpx.get(f"{server.url}/health").status_code == 200:
            assert time.monotonic() < deadline
        assert "engine" in httpx.get(f"{server.url}/health").json()["error"]["message"]
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_a_killed_server_leaves_no_core(serve):
    with serve() as server:
        core = core_of(server)
        server.process.kill()
        gone, _ = psutil.wait_procs([core], timeout=10)
        assert gone


def test_clients_that_leave_free_their_blocks(shared):
    async def run(server):
        async with make_client(server.url) as client:

            async def leave(i: int) -> None:
                body = {"prompt": prompt(i), "max_tokens": 250, "ignore_eos": True, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: "):
                            return  # after its first token

            async def stay(i: int) -> None:
                assert (await stream_completion(client, prompt(i), 100))[-1] == "[DONE]"

            await asyncio.gather(*((leave if i % 3 == 0 else stay)(i) for i in range(60)))

            await eventually(lambda: is_idle(client), 10)

    asyncio.run(run(shared))
    assert "path=/v1/completions status=200" in shared.log


def test_a_client_that_never_reads_is_dropped_and_others_go_on(shared):
    async def run(server):
        host, port = server.url.removeprefix("http://").split(":")
        # More than the buffers on the way hold.
        body = b'{"prompt": [5], "max_tokens": 240, "ignore_eos": true, "n": 32, "logprobs": 20, "stream": true}'
        with socket.create_connection((host, int(port))) as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            lazy.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            async with make_client(server.url) as client:
                events = await stream_completion(client, prompt(2), 20)
                assert events[-1] == "[DONE]"

                async def is_idle():
                    return await gauge(client, "num_requests_running") == 0

                async def is_dropped():
                    return "did not read its answer" in server.log

                await eventually(is_idle, 60)
                await eventually(is_dropped, 30)
                assert (await client.get("/health")).status_code == 200

    asyncio.run(run(shared))


def test_many_streams_each_get_their_own_answer(shared):
    async def run(server):
        async with make_client(server.url) as client:
            alone = [
                token_ids(await stream_completion(client, prompt(i), 24, return_token_ids=True)) for i in range(12)
            ]
            jobs = [stream_completion(client, prompt(i % 12), 24, return_token_ids=True) for i in range(72)]
            together = await asyncio.gather(*jobs)
        assert all(token_ids(events) == alone[i % 12] for i, events in enumerate(together))
        assert len({tuple(tokens) for tokens in alone}) > 6

    asyncio.run(run(shared))


def test_sigterm_lets_open_streams_end(shared):
    async def run(server):
        async with make_client(server.url) as client:
            task = await first_token_of(client)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.05)
            if not task.done():
                with pytest.raises((httpx.HTTPStatusError, httpx.TransportError)):
                    (await client.post("/v1/completions", json={"prompt": [1], "max_tokens": 1})).raise_for_status()
            events = await task
            assert events[-1] == "[DONE]"
            assert events[-2]["choices"][0]["finish_reason"] == "length"

    core = core_of(shared)
    asyncio.run(run(shared))
    assert shared.process.wait(30) == 0
    assert not core.is_running()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_hundred_streams_for_ten_minutes(tmp_path):
    """The embedded model: each stream's tokens are its own, 30% leave midway and free theirs, memory stays flat."""
    randomness = random.Random(0)

    async def one(client, i, expected, leaves):
        """The stream's tokens as far as it was read."""
        stay = randomness.randrange(1, 16) if leaves else 16
        body = {"prompt": [504, 3575, 282, 1000 + i], "max_tokens": 16, "ignore_eos": True, "temperature": 0}
        got = []
        async with client.stream(
            "POST", "/v1/completions", json=body | {"stream": True, "return_token_ids": True}
        ) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    got += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                if len(got) >= stay and leaves:
                    break
        assert got == expected[: len(got)]
        assert len(got) >= stay

    async def run(server):
        async with make_client(server.url) as client:
            expected = []
            for i in range(500):
                events = await stream_completion(client, [504, 3575, 282, 1000 + i], 16, return_token_ids=True)
                expected.append(token_ids(events))
            processes = [psutil.Process(server.process.pid), core_of(server)]
            sizes, started = [], time.monotonic()
            while time.monotonic() < started + 600:
                leaves = [randomness.random() < 0.3 for _ in expected]
                await asyncio.gather(*(one(client, i, tokens, leaves[i]) for i, tokens in enumerate(expected)))
                await eventually(lambda: is_idle(client))
                sizes.append(sum(p.memory_info().rss for p in processes))
            print(f"{len(sizes)} rounds of 500 streams; MiB in use: {[size >> 20 for size in sizes]}")
            # The first rounds fill pools and caches.
            assert max(sizes[len(sizes) // 2 :]) < max(sizes[: len(sizes) // 2]) + 20 * 2**20

    with live_server(tmp_path, "--max-num-seqs", "256") as server:
        asyncio.run(run(server))


def run_server(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atom.entrypoints.openai_server", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})


def test_a_port_in_use_is_told_in_one_line(serve, tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_server("--model", tiny, "--server-port", port)
    assert done.returncode == 2
    assert port in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server-port", "70000"], "server_port"),
        (["--ssl-certfile", "/nowhere.pem"], "ssl_keyfile"),
        (["--tool-call-parser", "nope"], "tool_call_parser"),
        (["--chat-template", "/nowhere.jinja"], "chat_template"),
        (["--max-queue", "-1"], "max_queue"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--load_dummy", "--attention-backend", "nope"], "attention_backend"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_told_in_one_line(tiny, flags, words):
    done = run_server("--model", tiny, "--server-port", "0", *flags)  # returns when no process has its stderr open
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
