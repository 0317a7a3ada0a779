"""/metrics after traffic whose numbers are known, and the log's lines about it."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atom.entrypoints.openai.metrics import Metrics, StatisticsLine

STORY = "Once upon a time, in a small village by the sea,"


def read(client):
    """{(name, finished_reason or bucket or ""): value}"""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        deadline = time.monotonic() + 20
        while read(client)["atom:num_requests_running", ""]:  # of an earlier test, whose client left
            assert time.monotonic() < deadline
        yield client


def complete(client, **fields):
    body = {"prompt": STORY, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | fields
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_counts_after_known_traffic(client):
    before = read(client)
    began = time.monotonic()
    answers = [complete(client), complete(client, max_tokens=5, n=3, temperature=1.0), complete(client, stop=" ")]
    seconds = time.monotonic() - began
    after = read(client)

    def grown(name, label=""):
        return after[f"atom:{name}", label] - before[f"atom:{name}", label]

    prompt = answers[0]["usage"]["prompt_tokens"]
    assert grown("prompt_tokens_total") == 5 * prompt
    generated = 8 + 3 * 5
    stopped = grown("generation_tokens_total") - generated
    assert 1 <= stopped <= 8
    assert grown("request_success_total", "length") == 4
    assert grown("request_success_total", "stop") == 1  # a stop string is an end like others
    assert grown("request_success_total", "abort") == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens"):
        assert grown(f"{name}_count") == 5
    assert grown("request_prompt_tokens_sum") == 5 * prompt
    assert grown("request_generation_tokens_sum") == generated + stopped
    assert 0 < grown("time_to_first_token_seconds_sum") < grown("e2e_request_latency_seconds_sum") < 5 * seconds
    assert grown("inter_token_latency_seconds_count") == generated + stopped - 5
    assert after["atom:engine_up", ""] == 1
    assert 0 <= after["atom:kv_cache_usage_perc", ""] <= 1
    assert after["atom:num_requests_waiting", ""] == 0


def test_cumulative_buckets_and_labels(client):
    complete(client)
    text = client.get("/metrics").text
    assert 'model_name="smollm2"' in text
    samples = read(client)
    names = {name.removesuffix("_bucket") for name, _ in samples if name.endswith("_bucket")}
    assert len(names) >= 6
    for name in names:
        buckets = {float(le): count for (bucket, le), count in samples.items() if bucket == f"{name}_bucket"}
        counts = [buckets[bound] for bound in sorted(buckets)]
        assert counts == sorted(counts)
        assert counts[-1] == samples[f"{name}_count", ""] > 0


def test_a_client_that_leaves_counts_as_an_abort(client):
    before = read(client)["atom:request_success_total", "abort"]
    body = {"prompt": STORY, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 20
    while read(client)["atom:request_success_total", "abort"] != before + 1:
        assert time.monotonic() < deadline


def test_cache_hits_and_lines_of_the_log(guarded_server):
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=guarded_server.url, timeout=60, headers=headers) as client:
        text = "A rather long text that was never seen before, " * 8
        prompt = complete(client, prompt=text)["usage"]["prompt_tokens"]
        before = read(client)
        cached = complete(client, prompt=text)["usage"]["prompt_tokens_details"]["cached_tokens"]
        after = read(client)
        assert after["atom:prefix_cache_hits_total", ""] - before["atom:prefix_cache_hits_total", ""] == cached
        assert after["atom:prefix_cache_queries_total", ""] - before["atom:prefix_cache_queries_total", ""] == prompt
        assert 0 < cached < prompt

        named = client.get("/v1/models", headers={"X-Request-Id": "mine-1"})
        forged = client.get("/v1/models", headers={"X-Request-Id": "a b status=200"})
        assert named.headers["x-request-id"] == "mine-1"
        assert forged.headers["x-request-id"] != "a b status=200"
        refused = client.post("/v1/completions", json={"prompt": []}, headers={"X-Request-Id": "mine-2"})
        assert refused.status_code == 400
        body = {"prompt": "Hi", "max_tokens": 2}
        assert "mine-3" in client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-3"}).json()["id"]
    deadline = time.monotonic() + 20
    while "request id=mine-3" not in guarded_server.log:  # written after the answer
        assert time.monotonic() < deadline
    assert "request id=mine-1 method=GET path=/v1/models status=200 seconds=" in guarded_server.log
    assert "request id=mine-2 method=POST path=/v1/completions status=400 seconds=" in guarded_server.log
    assert "a b status" not in guarded_server.log


def test_the_line_of_statistics_tells_what_happened_since_the_last():
    metrics = Metrics("model")
    line = StatisticsLine(metrics)
    assert line.next({}) == ""  # nothing has
    metrics.generation_tokens += 100
    text = line.next({"running": 2, "waiting": 1, "kv_cache_usage": 0.25, "prefix_hit_rate": 0.5})
    assert "running 2, waiting 1, KV cache 25.0%, prefix hits 50.0%" in text
    assert "generation 0.0" not in text
    assert "generation 0.0 tokens/s, running 1" in line.next({"running": 1})
    assert line.next({}) == ""
