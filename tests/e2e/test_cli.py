"""Whole programs, as a user starts them, on the embedded model."""

import json
import signal
import subprocess
import sys
import time

import pytest

ATOM = [sys.executable, "-m", "atom.entrypoints.cli"]
SMALL = ["--max-model-len", "256", "--max-num-seqs", "4", "--log-level", "warning", "--device", "cpu"]


def run(*command, stdin=""):
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=280)


def test_generate_streams_one_prompt():
    prompt = "The capital of France is"
    result = run(*ATOM, "generate", prompt, *SMALL, "--temperature", "0", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens/s" in result.stderr


def test_generate_many_as_json_with_one_rejected():
    prompts = ["The capital of France is", "word " * 300, "-"]
    result = run(*ATOM, "generate", *prompts, *SMALL, "--json", "--temperature=0", "--max_tokens=8", stdin="One, two,")
    assert result.returncode == 2
    outputs = [json.loads(line) for line in result.stdout.splitlines()]
    assert "Paris" in outputs[0]["outputs"][0]["text"]
    assert outputs[1]["outputs"] == []
    assert "max_model_len=256" in outputs[1]["error"]
    assert outputs[2]["prompt"] == "One, two,"
    assert "Traceback" not in result.stderr


def test_a_single_wrong_prompt_is_one_line():
    result = run(*ATOM, "generate", "word " * 300, *SMALL)
    assert result.returncode == 2
    assert result.stderr.startswith("atom: error: prompt has")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_module_entrypoint_with_the_guides_flags():
    flags = ["--model", "smollm2", "--enforce-eager", "--enable_prefix_caching", "--kv_cache_dtype", "fp8"]
    flags += ["--block-size", "16", "--max-num-batched-tokens", "512", "--prompt", "One, two,", "--prompt", "Hello"]
    result = run(sys.executable, "-m", "atom.entrypoint", *flags, *SMALL, "--max-tokens", "4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Prompt: ") == result.stdout.count("Text: ") == 2
    assert "8 tokens in" in result.stderr


def test_chat_through_pipes_remembers_and_resets():
    lines = "My name is Bob.\nWhat is my name?\n/reset\n/unheard-of\n/exit\nnever read\n"
    result = run(*ATOM, "chat", *SMALL, "--temperature", "0", "--max-tokens", "24", stdin=lines)
    assert result.returncode == 0, result.stderr
    assert "Bob" in result.stdout
    assert "never read" not in result.stdout


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_bench_ends_in_a_json_line(kind):
    size = ["--num-prompts", "3"] if kind == "throughput" else ["--batch-size", "2"]
    flags = [*size, "--input-len", "4-9", "--output-len", "5", "--repeat", "2"]
    result = run(*ATOM, "bench", kind, *flags, *SMALL)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["num_requests"] == (3 if kind == "throughput" else 2)
    assert report["output_tokens_per_s"] > 0
    low, high = report["seconds_range"]
    assert low <= report["seconds"] <= high
    assert ("ttft_s" in report) == (kind == "latency")


def test_config_has_a_memory_plan():
    result = run(*ATOM, "config", "--json", *SMALL)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    plan = report["memory_plan"]
    assert plan["num_blocks"] == report["config"]["num_kvcache_blocks"] > 0
    assert plan["cache_bytes"] == plan["num_blocks"] * plan["bytes_per_block"]


def test_ctrl_c_ends_without_a_trace():
    command = [*ATOM, "generate", "Once upon a time", *SMALL, "--max-tokens", "200", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(1)  # it is generating
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
