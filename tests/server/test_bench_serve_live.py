"""`atom bench serve` against a live server: the same command lines as a user's."""

import json
import subprocess
import sys

import pytest


def bench(server, *flags):
    command = [sys.executable, "-m", "atom.entrypoints.cli", "bench", "serve", "--base-url", server.url, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_sweep_with_exact_counts(server, tmp_path):
    path = tmp_path / "sweep.json"
    flags = ["--num-prompts", "6", "--input-len", "12", "--output-len", "5", "--ignore-eos", "--temperature", "0"]
    flags += ["--max-concurrency", "1", "3", "--request-rate", "inf", "50", "--goodput", "ttft:60000", "tpot:60000"]
    result = bench(server, *flags, "--json", str(path), "--save-detailed", "--reset-prefix-cache")
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert report["prompt_type"] == "ids"
    assert report["model"] == "smollm2"
    assert [(p["request_rate"], p["max_concurrency"]) for p in report["points"]] == [
        ("inf", 1), ("inf", 3), (50.0, 1), (50.0, 3),
    ]  # fmt: skip
    for point in report["points"]:
        assert (point["ok"], point["failed"], point["exact_counts"]) == (6, 0, True)
        assert (point["input_tokens"], point["output_tokens"]) == (72, 30)
        assert point["peak_concurrency"] <= point["max_concurrency"]
        assert point["goodput"] == pytest.approx(point["requests_per_s"])
        for request in point["requests"]:
            assert request["finish_reason"] == "length"
            assert request["ttft"] + sum(request["itl"]) == pytest.approx(request["e2el"], abs=1e-4)
    assert result.stdout.count("6 ok, 0 failed") == 4
    assert "50 req/s, at most 3" in result.stdout


def test_chats_over_shared_prefixes(server, tmp_path):
    path = tmp_path / "chat.json"
    flags = ["--endpoint", "/v1/chat/completions", "--dataset", "prefix", "--num-prefixes", "2", "--prefix-len", "40"]
    flags += ["--num-prompts", "4", "--input-len", "8", "--output-len", "4", "--ignore-eos", "--json", str(path)]
    result = bench(server, *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    (point,) = report["points"]
    assert (report["prompt_type"], point["ok"], point["output_tokens"]) == ("words", 4, 16)
    assert point["input_tokens"] >= 4 * 48


def test_sharegpt(server, tmp_path):
    conversation = {
        "conversations": [
            {"from": "human", "value": "Name the three primary colours, please."},
            {"from": "gpt", "value": "Red, yellow and blue."},
        ]
    }
    data, path = tmp_path / "share.json", tmp_path / "r.json"
    data.write_text(json.dumps([conversation]))
    flags = ["--dataset", "sharegpt", "--dataset-path", str(data), "--num-prompts", "2", "--json", str(path)]
    result = bench(server, *flags, "--ignore-eos")
    assert result.returncode == 0, result.stderr
    (point,) = json.loads(path.read_text())["points"]
    assert (point["ok"], point["output_tokens"]) == (2, 12)  # 21 characters are taken for 6 tokens


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no-such"], "the warm-up failed: HTTP 404"),
        (["--endpoint", "/v1/nothing"], "the warm-up failed: HTTP 404"),
        (["--input-len", "5000"], "the warm-up failed: HTTP 400"),
    ],
)
def test_what_the_server_refuses_is_one_line(server, flags, message):
    result = bench(server, *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_failures_are_counted_by_reason(server):
    flags = ["--model", "no-such", "--num-prompts", "3", "--warmup", "0", "--prompt-type", "words"]
    result = bench(server, *flags)
    assert result.returncode == 2
    assert "0 ok, 3 failed" in result.stdout
    assert "3 x HTTP 404" in result.stdout
