"""`atom bench serve` without a model: statistics by hand, parsing, workloads, and the client against real sockets."""

import asyncio
import json
import math
import signal
import statistics
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom.entrypoints import cli
from atom.entrypoints.bench_serve.client import Client
from atom.entrypoints.bench_serve.events import AnswerReader, error_text
from atom.entrypoints.bench_serve.metrics import (
    distribution,
    meets,
    parse_goodput,
    peak_concurrency,
    percentile,
    summarize,
)
from atom.entrypoints.bench_serve.records import Prompt, Record
from atom.entrypoints.bench_serve.runner import request_body, run_load
from atom.entrypoints.bench_serve.settings import BenchSettings
from atom.entrypoints.bench_serve.sse import EventParser
from atom.entrypoints.bench_serve.workload import (
    arrival_times,
    load_sharegpt,
    prefix_prompts,
    random_prompts,
    sharegpt_prompts,
)
from atom.utils.errors import ConfigError

# --- statistics


def make_record(started, events, tokens=None, error=None, prompt_tokens=10):
    ended = events[-1] if events else started + 1
    return Record(
        output_len=8, started=started, ended=ended, event_times=events,
        completion_tokens=tokens, prompt_tokens=prompt_tokens, error=error,
    )  # fmt: skip


def test_percentiles_are_linear_between_neighbours():
    assert percentile([5.0], 99) == 5.0
    assert percentile([10.0, 20.0, 30.0, 40.0], 50) == 25.0
    assert percentile([10.0, 20.0, 30.0, 40.0], 90) == pytest.approx(37.0)  # position 2.7
    assert percentile([0.0, 100.0], 99) == pytest.approx(99.0)


def test_a_distribution_is_in_milliseconds_of_unsorted_seconds():
    result = distribution([0.003, 0.001, 0.002])
    assert (result.mean, result.median) == (pytest.approx(2.0), pytest.approx(2.0))
    assert (result.p90, result.p95, result.p99) == (pytest.approx(2.8), pytest.approx(2.9), pytest.approx(2.98))
    assert distribution([]) is None


def test_latencies_of_one_record():
    # Two tokens came in the middle event: four tokens, three events.
    record = make_record(1.0, [1.5, 1.75, 2.25], tokens=4)
    assert record.ttft == 0.5
    assert record.tpot == 0.25  # 0.75 s for three tokens after the first
    assert record.itl == [0.25, 0.5]
    assert record.e2el == 1.25
    assert make_record(1.0, [1.5], tokens=1).tpot is None


def test_a_point_by_hand():
    records = [
        make_record(10.0, [10.5, 11.0], tokens=2),  # ttft 500, tpot 500, e2el 1000
        make_record(10.0, [10.1, 10.2, 10.3], tokens=5),  # ttft 100, tpot 50, e2el 300
        make_record(11.0, [], error="HTTP 429: full"),  # ends at 12.0
        make_record(11.0, [], error="HTTP 429: full"),
        make_record(11.0, [11.5], tokens=9, error="connection lost"),
        Record(output_len=8, started=11.5),  # never ended
    ]
    point = summarize(records, request_rate=4, max_concurrency=2, objectives={"ttft": 200, "tpot": 60})
    assert (point.ok, point.failed) == (2, 3)
    assert point.failures == {"HTTP 429: full": 2, "connection lost": 1}
    assert point.duration == 2.0
    assert (point.input_tokens, point.output_tokens, point.exact_counts) == (20, 7, True)
    assert (point.requests_per_s, point.input_tokens_per_s) == (1.0, 10.0)
    assert (point.output_tokens_per_s, point.total_tokens_per_s) == (3.5, 13.5)
    assert point.goodput == 0.5
    assert point.latencies["ttft"].mean == pytest.approx(300)
    assert point.latencies["tpot"].mean == pytest.approx(275)
    assert point.latencies["itl"].mean == pytest.approx((500 + 100 + 100) / 3)
    assert point.latencies["e2el"].mean == pytest.approx(650)


def test_events_are_counted_where_a_server_counts_no_tokens():
    record = make_record(0.0, [1.0, 2.0, 3.0], prompt_tokens=None)
    record.input_len = 7
    point = summarize([record])
    assert (point.input_tokens, point.output_tokens, point.exact_counts) == (7, 3, False)


def test_nothing_measured_is_no_division_by_zero():
    point = summarize([])
    assert (point.ok, point.duration, point.requests_per_s, point.latencies) == (0, 0.0, 0.0, {})


def test_peak_concurrency():
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75)]
    assert peak_concurrency([Record(output_len=1, started=a, ended=b) for a, b in spans]) == 3


def test_goodput():
    assert parse_goodput(["ttft:200", "e2el:5000.5"]) == {"ttft": 200.0, "e2el": 5000.5}
    record = make_record(0.0, [0.25, 0.5], tokens=2)
    assert meets(record, {"ttft": 250, "tpot": 250, "e2el": 500})
    assert not meets(record, {"ttft": 250, "tpot": 249, "e2el": 500})
    assert meets(make_record(0.0, [0.25], tokens=1), {"tpot": 1})
    for text in ("ttft", "ttft:", "ttft:nan", "ttft:-1", "itl:5", "ttft:0"):
        with pytest.raises(ConfigError, match="goodput"):
            parse_goodput([text])


# --- events

PAYLOAD = st.binary(max_size=12).filter(lambda b: not set(b) & set(b"\r\n"))
EVENT = st.lists(PAYLOAD, min_size=1, max_size=3)


@given(
    events=st.lists(EVENT, max_size=6),
    line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    head=st.sampled_from([b"data: ", b"data: ", b"event: x\ndata: ", b": comment\ndata: "]),
    data=st.data(),
)
def test_events_survive_any_split(events, line_end, head, data):
    lines = [[(head if i == 0 else b"data: ") + line for i, line in enumerate(event)] for event in events]
    text = b"".join(b"\n".join(event) + b"\n\n" for event in lines).replace(b"\n", line_end)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parser = EventParser()
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += parser.feed(text[begin:end])
    assert found == [b"\n".join(event) for event in events]


def test_an_event_without_its_blank_line_is_not_complete():
    parser = EventParser()
    assert parser.feed(b"data: a\n\ndata: b\n") == [b"a"]
    assert parser.feed(b"\n") == [b"b"]
    assert parser.feed(b"data:c\n\n") == [b"c"]
    assert parser.feed(b"\n\nevent: ping\n\n") == []


def read_all(*events):
    record = Record(output_len=4)
    reader = AnswerReader(record)
    for when, event in enumerate(events):
        reader.read(event if isinstance(event, bytes) else json.dumps(event).encode(), float(when))
    reader.end()
    return record


def test_a_completion_is_read():
    record = read_all(
        {"choices": [{"index": 0, "text": "a", "finish_reason": None}], "usage": None},
        {"choices": [{"index": 0, "text": "", "finish_reason": None}]},  # a token, without text as yet
        {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}},
        b"[DONE]",
    )
    assert record.error is None
    assert record.event_times == [0.0, 1.0]
    assert (record.prompt_tokens, record.completion_tokens, record.finish_reason) == (3, 2, "length")


def test_a_chat_is_read():
    record = read_all(
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        b"[DONE]",
    )
    assert record.error is None
    assert record.event_times == [1.0, 2.0, 3.0]


def test_what_is_no_whole_answer_is_an_error():
    text = {"choices": [{"text": "a", "finish_reason": None}]}
    assert read_all(text).error == "the stream ended before the answer did"
    assert read_all(text, {"error": {"message": "engine\ndied"}}).error == "error in the stream: engine died"
    assert read_all(b"{").error == "an event is not the JSON of a completion"
    assert read_all(b"[DONE]").error == "the answer has no tokens"


def test_error_texts():
    assert error_text(b'{"error": {"message": "no", "code": 1}}') == "no"
    assert error_text(b'{"object": "error", "message": "no"}') == "no"
    assert error_text(b'{"detail": [{"loc": 1}]}') == "[{'loc': 1}]"
    assert error_text(b"<html>\n" + b"x" * 500) == "<html> " + "x" * 193


# --- workloads


def test_workloads_repeat_by_seed():
    options = {"input_len": 20, "output_len": 10, "range_ratio": 0.5, "vocab_size": 5000}
    assert random_prompts(9, **options, seed=1) == random_prompts(9, **options, seed=1)
    assert random_prompts(9, **options, seed=1) != random_prompts(9, **options, seed=2)
    shared = {**options, "num_prefixes": 2, "prefix_len": 6}
    assert prefix_prompts(9, **shared, seed=1) == prefix_prompts(9, **shared, seed=1)
    assert arrival_times(9, 3.0, seed=1) == arrival_times(9, 3.0, seed=1)
    assert arrival_times(9, 3.0, seed=1) != arrival_times(9, 3.0, seed=2)


def test_random_lengths_and_ids():
    prompts = random_prompts(300, input_len=20, output_len=10, range_ratio=0.5, vocab_size=5000, seed=0)
    assert all(len(p.prompt) == p.input_len for p in prompts)
    assert (min(p.input_len for p in prompts), max(p.input_len for p in prompts)) == (10, 30)
    assert (min(p.output_len for p in prompts), max(p.output_len for p in prompts)) == (5, 15)
    ids = [i for p in prompts for i in p.prompt]
    assert min(ids) >= 1000
    assert max(ids) < 5000
    words = random_prompts(3, input_len=20, output_len=10, vocab_size=None, seed=0)
    assert [len(p.prompt.split()) for p in words] == [20, 20, 20]


@pytest.mark.parametrize("vocab_size", [5000, None])
def test_prefixes_are_shared_evenly(vocab_size):
    prompts = prefix_prompts(
        12, num_prefixes=3, prefix_len=40, input_len=5, output_len=1, vocab_size=vocab_size, seed=0
    )
    tokens = [p.prompt.split() if vocab_size is None else p.prompt for p in prompts]
    assert {len(t) for t in tokens} == {45}
    assert {p.input_len for p in prompts} == {45}
    beginnings = [tuple(t[:40]) for t in tokens]
    assert sorted(beginnings.count(b) for b in set(beginnings)) == [4, 4, 4]
    assert len({tuple(t[40:]) for t in tokens}) == 12


def test_arrivals_have_the_rate_and_burstiness_asked_for():
    def gaps(burstiness):
        times = arrival_times(20001, 50.0, burstiness, seed=3)
        assert times[0] == 0.0
        return [b - a for a, b in pairwise(times)]

    for burstiness in (0.5, 1.0, 4.0):
        values = gaps(burstiness)
        mean = statistics.fmean(values)
        assert mean == pytest.approx(1 / 50, rel=0.05)
        # Of a gamma distribution of shape k the deviation is mean / sqrt(k).
        assert statistics.pstdev(values) == pytest.approx(mean / math.sqrt(burstiness), rel=0.05)
    assert arrival_times(3, math.inf, seed=0) == [0.0, 0.0, 0.0]


def write_conversations(path, *pairs):
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in pairs]
    others = [{"conversations": []}, {"id": 1}, {"conversations": [{"from": "gpt", "value": "x"}] * 2}]
    path.write_text(json.dumps(others + [{"id": "1", "conversations": turn} for turn in turns]))
    return str(path)


def test_sharegpt(tmp_path):
    path = write_conversations(tmp_path / "s.json", ("q" * 40, "a" * 81), ("hi", "a" * 400), ("q" * 9000, "a" * 80))
    pairs = load_sharegpt(path)
    assert len(pairs) == 3
    prompts = sharegpt_prompts(pairs, 2, seed=0)  # the second is too short, the third too long
    assert prompts == [Prompt(prompt="q" * 40, input_len=10, output_len=21)] * 2
    assert sharegpt_prompts(pairs, 1, output_len=3, seed=0)[0].output_len == 3
    with pytest.raises(ConfigError, match="max_total_len=5"):
        sharegpt_prompts(pairs, 1, max_len=5, seed=0)


@pytest.mark.parametrize("content", [b"[1", b"\xff", b"{}", b"[]", b'[{"conversations": 3}]'])
def test_sharegpt_refuses_other_files(content, tmp_path):
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="dataset_path="):
        load_sharegpt(str(path))


def test_bodies():
    prompt = Prompt(prompt="hi", input_len=1, output_len=4)
    body = request_body(prompt, chat=True, model="m", ignore_eos=False, options={"temperature": 0.5})
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["temperature"], "ignore_eos" in body) == (4, 0.5, False)
    assert request_body(prompt, chat=False, model="m", ignore_eos=True, options={})["ignore_eos"] is True


# --- the client, over sockets

EVENTS = b"".join(
    b"data: " + json.dumps({"choices": [{"text": t, "finish_reason": f}]}).encode() + b"\n\n"
    for t, f in (("a", None), ("b", None), ("", "length"))
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"data: [DONE]\n\n"


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """Answers each request with the bytes that `answer` makes of its number; None closes the connection."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.connections = 0
        self.open = self.peak = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, after = head.lower().partition(b"content-length: ")
                length = int(after.split(b"\r\n")[0] or 0)
                self.requests.append((head, await reader.readexactly(length)))
                self.open += 1
                self.peak = max(self.peak, self.open)
                answer = self.answer(len(self.requests))
                await asyncio.sleep(0.01)
                self.open -= 1
                if answer is None:
                    break
                for part in answer if isinstance(answer, list) else [answer]:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                if b"Connection: close" in (answer if isinstance(answer, bytes) else b""):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def run_requests(answer, count=1, places=None, **options):
    async def run():
        async with Server(answer) as server:
            client = Client(server.url + "/v1/", {"X-Me": "1"}, **options)
            records = [Record(output_len=2) for _ in range(count)]
            request = client.encode("POST", "/v1/completions", {"prompt": "ä"})
            await run_load(client, [request] * count, records, [0.0] * count, places)
            client.close()
            return server, records

    return asyncio.run(run())


GOOD = CHUNKED + chunk(EVENTS) + chunk(END) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, len(GOOD)])
def test_answers_in_pieces_on_a_kept_connection(size):
    answer = [GOOD[i : i + size] for i in range(0, len(GOOD), size)]
    server, records = run_requests(lambda _: answer, count=6, places=2)
    assert [record.error for record in records] == [None] * 6
    for record in records:
        assert len(record.event_times) == 2
        assert record.started < record.event_times[0] <= record.event_times[1] == record.ended
        assert record.finish_reason == "length"
    assert (server.connections, server.peak) == (2, 2)
    head, body = server.requests[0]
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nX-Me: 1\r\n" in head
    assert json.loads(body) == {"prompt": "ä"}


def test_an_answer_may_end_with_its_connection():
    server, records = run_requests(lambda _: HEAD + b"Connection: close\r\n\r\n" + EVENTS + END, count=2, places=1)
    assert [record.error for record in records] == [None, None]
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 28\r\n\r\n" + b'{"error": {"message": "no"}}', "HTTP 429: no"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "the answer is not an event stream"),
        (CHUNKED + chunk(b"data: {}\n\n") + b"0\r\n\r\n", "the stream ended before the answer did"),
        (None, "connection lost"),
        (b"SSH-2.0\r\n\r\n", "not HTTP"),
    ],
)
def test_failures_have_reasons(answer, error):
    _, (record,) = run_requests(lambda _: answer)
    assert record.error.startswith(error)
    assert record.ended > record.started


def test_a_kept_connection_that_was_closed_is_replaced():
    # The server closes its connection instead of answering its second request, and takes the third.
    server, records = run_requests(lambda number: None if number == 2 else GOOD, count=2, places=1)
    assert [record.error for record in records] == [None, None]
    assert (server.connections, len(server.requests)) == (2, 3)


def test_a_request_that_takes_too_long_ends():
    _, (record,) = run_requests(lambda _: CHUNKED + chunk(EVENTS), timeout=0.2)
    assert record.error == "timeout after 0.2 s"


def test_no_server_is_one_reason():
    async def run():
        async with Server(lambda _: None) as server:
            url = server.url
        record = Record(output_len=1)
        client = Client(url)
        await client.stream(client.encode("POST", "/", {}), record)
        return record

    assert asyncio.run(run()).error == "connection refused"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "http://x:99999"])
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError, match="base_url="):
        Client(url)


def test_headers_cannot_carry_others():
    for name, value in (("A", "x\r\nB: y"), ("A B", "x"), ("", "x"), ("A:", "x")):
        with pytest.raises(ConfigError, match="header="):
            Client("http://x", {name: value})


# --- the command


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0 must be at least 1"),
        ({"request_rate": [1.0, -1.0]}, "request_rate=-1.0"),
        ({"max_concurrency": [0]}, "max_concurrency=0"),
        ({"range_ratio": 1.0}, "range_ratio=1.0"),
        ({"burstiness": 0.0}, "burstiness=0.0"),
        ({"dataset": "sharegpt"}, "dataset_path is missing"),
        ({"dataset_path": "x"}, "needs dataset='sharegpt'"),
        ({"endpoint": "/v1/chat/completions", "prompt_type": "ids"}, "a chat takes only text"),
        ({"endpoint": "v1"}, "endpoint='v1' must be a path"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**values)


def test_a_sweep_is_every_combination():
    settings = BenchSettings(request_rate=[1.0, math.inf], max_concurrency=[4, None])
    assert settings.points == [(1.0, 4), (1.0, None), (math.inf, 4), (math.inf, None)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--base-url", "http://127.0.0.1:1"], "base_url='http://127.0.0.1:1': connection refused"),
        (["--header", "x"], "header='x' must be NAME=VALUE"),
        (["--json", "/nowhere/x.json"], "json='/nowhere/x.json': its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert cli.main(["bench", "serve", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"atom: error: {message}\n"
    assert captured.out == ""


def test_a_run_imports_no_engine():
    code = """
import sys
from itertools import pairwise
from atom.entrypoints.cli import main
main(["bench", "serve", "--base-url", "http://127.0.0.1:1"])
print([m for m in ("torch", "transformers", "numpy", "fastapi", "matplotlib") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_ctrl_c_prints_what_was_measured(tmp_path):
    async def run():
        async with Server(lambda number: GOOD if number <= 3 else CHUNKED) as server:
            argv = ["--base-url", server.url, "--model", "m", "--num-prompts", "6", "--max-concurrency", "1"]
            argv += ["--prompt-type", "words", "--warmup", "0", "--json", str(tmp_path / "r.json")]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "atom.entrypoints.cli", "bench", "serve", *argv, stdout=-1, stderr=-1
            )
            while len(server.requests) < 4 or server.open:  # the second completion hangs, after two GETs
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGINT)
            return process, *(await process.communicate())

    process, out, err = asyncio.run(asyncio.wait_for(run(), 60))
    assert process.returncode == 130
    assert err.decode() == "interrupted; 5 requests of the last row are not in it\n"
    assert "1 ok, 0 failed" in out.decode()
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["interrupted"], report["unfinished"], len(report["points"])) == (True, 5, 1)


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from atom.entrypoints.bench_serve.plot import write_plot

    good = summarize([make_record(0.0, [0.5, 1.0], tokens=2)], request_rate=2, objectives={"ttft": 1})
    failed = summarize([make_record(0.0, [], error="HTTP 429: full")], request_rate=math.inf, max_concurrency=3)
    write_plot(str(tmp_path / "p.png"), [good, failed], "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
