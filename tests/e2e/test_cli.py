"""The commands on the embedded model; most in this process, which has paid for its imports."""

import gc
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from atom import entrypoint
from atom.entrypoints import cli

ATOM = [sys.executable, "-m", "atom.entrypoints.cli"]
SMALL = ["--max-model-len", "256", "--max-num-seqs", "4", "--log-level", "warning", "--device", "cpu"]
SMALL += ["--enforce-eager"]  # compiling is tested elsewhere


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*argv, stdin="", main=cli.main):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main(argv)
        return Result(code, *capsys.readouterr())

    yield call
    gc.unfreeze()  # a command freezes what it has loaded: the process would end with it
    gc.collect()


def test_generate_one_prompt(run):
    result = run("generate", "The capital of France is", *SMALL, "--temperature", "0", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens/s" in result.stderr


def test_generate_many_as_json_with_one_rejected(run):
    prompts = ["The capital of France is", "word " * 300, "-"]
    result = run("generate", *prompts, *SMALL, "--json", "--temperature=0", "--max_tokens=8", stdin="One, two,")
    assert result.returncode == 2
    outputs = [json.loads(line) for line in result.stdout.splitlines()]
    assert "Paris" in outputs[0]["outputs"][0]["text"]
    assert outputs[1]["outputs"] == []
    assert "max_model_len=256" in outputs[1]["error"]
    assert outputs[2]["prompt"] == "One, two,"
    assert "Traceback" not in result.stderr


def test_a_single_wrong_prompt_is_one_line(run):
    result = run("generate", "word " * 300, *SMALL)
    assert result.returncode == 2
    assert result.stderr.startswith("atom: error: prompt has")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_module_entrypoint_with_the_guides_flags(run):
    flags = ["--model", "smollm2", "--enable_prefix_caching", "--kv_cache_dtype", "fp8"]
    flags += ["--block-size", "16", "--max-num-batched-tokens", "512", "--prompt", "One, two,", "--prompt", "Hello"]
    result = run(*flags, *SMALL, "--max-tokens", "4", main=entrypoint.main)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Prompt: ") == result.stdout.count("Text: ") == 2
    assert "8 tokens in" in result.stderr


def test_chat_through_pipes_remembers_and_resets(run):
    first, then = "Name a river in France.", "Where does it end?"
    lines = "\n".join([first, then, "/reset", then, "/reset", first, "/exit", "never read"])
    flags = ["--temperature", "0", "--max-tokens", "16", "--stop", "\n"]
    result = run("chat", *SMALL, *flags, stdin=lines)
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 4
    assert answers[1] != answers[2]
    assert answers[0] == answers[3]


def test_chat_commands(run):
    lines = "/help\n/rest\n\n/system Answer in French.\n"
    result = run("chat", *SMALL, stdin=lines)
    assert result.stdout.startswith("/reset forgets")
    assert "unknown command '/rest' (did you mean '/reset'?)" in result.stderr


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_bench_ends_in_a_json_line(run, kind):
    size = ["--num-prompts", "3"] if kind == "throughput" else ["--batch-size", "2"]
    flags = [*size, "--input-len", "4-9", "--output-len", "5", "--repeat", "2"]
    result = run("bench", kind, *flags, *SMALL)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["num_requests"] == (3 if kind == "throughput" else 2)
    assert report["output_tokens_per_s"] > 0
    low, high = report["seconds_range"]
    assert low <= report["seconds"] <= high
    assert ("ttft_s" in report) == (kind == "latency")


def test_config_has_a_memory_plan(run):
    result = run("config", "--json", *SMALL)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    plan = report["memory_plan"]
    assert plan["num_blocks"] == report["config"]["num_kvcache_blocks"] > 0
    assert plan["cache_bytes"] == plan["num_blocks"] * plan["bytes_per_block"]


def test_it_streams_and_ctrl_c_ends_it_without_a_trace():
    endless = ["--ignore-eos", "--max-model-len", "4096", "--max-tokens", "4000"]  # so that it can't end by itself
    command = [*ATOM, "generate", "Once upon a time", *SMALL, *endless]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(1)  # it is generating
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
