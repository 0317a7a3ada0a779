"""The GPU suite's tiny mode on a CPU, and what it is made of: budgets, processes that die, verdicts, tables."""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "scripts"))
sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import gpu_engine
import gpu_suite
from gpu_suite_parts.pool import run_tasks
from gpu_suite_parts.sanitizer import verdict
from gpu_suite_parts.text import NUM_OUTPUT, compare
from gpu_suite_parts.timings import markdown

ROOT = Path(__file__).parents[3]


def suite(*arguments, **env):
    command = [sys.executable, str(ROOT / "scripts" / "gpu_suite.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=280)


def options(**values):
    defaults = {"tiny": True, "model": None, "level": 0, "mode": "NONE", "workers": 1, "budget_s": 60, "json": None}
    return argparse.Namespace(**(defaults | values))


# What the other parts check in tiny mode, tests/kernels and tests/e2e check, too, and at less cost.
@pytest.mark.parametrize(
    "parts", [pytest.param(gpu_suite.PARTS, marks=pytest.mark.slow), ["sanitizer", "memory", "timings"]]
)
def test_tiny_mode_runs_every_part(tmp_path, parts):
    done = suite("--tiny", "--only", *parts, "--json", str(tmp_path / "a.json"), OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert report == json.loads((tmp_path / "gpu_suite.json").read_text())
    assert (tmp_path / "gpu_suite.log").is_file()
    statuses = {p: {c["status"] for c in r["cases"].values()} for p, r in report["parts"].items()}
    assert statuses.pop("sanitizer") == {"not run"}
    assert list(statuses) == [part for part in gpu_suite.PARTS if part in parts and part != "sanitizer"]
    assert all("ok" in found for found in statuses.values())
    assert "| tiny | decode 2 x 40 |" in done.stdout
    assert "NOT RUN sanitizer" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = suite()
    assert done.returncode == 2
    assert done.stderr == "gpu_suite: no GPU here; --tiny runs the same paths on the CPU\n"


def test_a_part_is_stopped_when_its_time_is_up(tmp_path):
    report = gpu_suite.run_part("memory", 2.0, options(), tmp_path)
    assert report["stopped"]
    assert list(report["cases"].values()) == [{"status": "not run", "detail": "budget"}]
    assert gpu_suite.summarize({"memory": report}) == 0


def test_parts_without_time_are_named(tmp_path):
    reports = gpu_suite.run_stages(["kernels", "timings"], options(budget_s=1), tmp_path)
    assert {name: r["cases"] for name, r in reports.items()} == {
        name: {name: {"status": "not run", "detail": "budget"}} for name in ("kernels", "timings")
    }


def test_a_part_that_breaks_is_a_failure(tmp_path, capsys):
    report = gpu_suite.run_part("no_such_part", 60.0, options(), tmp_path)
    assert gpu_suite.summarize({"no_such_part": report}) == 1
    assert "ModuleNotFoundError" in capsys.readouterr().out


def work(task):
    if task == "dies":
        os._exit(3)
    if task == "fails":
        raise ValueError("two\nlines")
    if task == "sleeps":
        time.sleep(60)
    return task * 2


def test_tasks_of_a_dead_process_run_again():
    found = dict(run_tasks(work, ["a", "dies", "fails", "b"], workers=2))
    assert {task: outcome.value for task, outcome in found.items() if not outcome.problem} == {"a": "aa", "b": "bb"}
    assert found["dies"].problem == "its process died"
    assert found["fails"].problem.startswith("ValueError at test_gpu_suite.py")
    assert found["fails"].problem.endswith(": two lines")


def test_tasks_end_with_the_deadline():
    started = time.monotonic()
    found = dict(run_tasks(work, ["a", "sleeps"], workers=2, deadline=started + 6))
    assert not found["sleeps"].finished
    assert not found["sleeps"].problem
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= Invalid __global__ read of size 2 bytes\n========= ERROR SUMMARY: 3 errors", 97, "failed"),
        ("========= ERROR SUMMARY: 0 errors", 1, "failed"),
        ("Traceback: something", 1, "failed"),
        ("========= Error: Device not supported\n========= ERROR SUMMARY: 1 error", 1, "not run"),
    ],
)
def test_verdicts_of_the_sanitizer(output, code, expected):
    assert verdict(output, code)[0] == expected


def test_comparing_texts():
    golden = {"tokens": [list(range(NUM_OUTPUT))] * 3, "logprobs": [[-1.0, -2.0], [-3.0], [-0.5]]}
    late = [*range(9), *[0] * (NUM_OUTPUT - 9)]
    assert compare(golden, golden, "float32")[0]
    parted = golden | {"tokens": [late] * 3}
    assert not compare(parted, golden, "float32")[0]
    assert compare(parted, golden, "bfloat16")[0]
    early = [*range(7), *[0] * (NUM_OUTPUT - 7)]
    assert not compare(golden | {"tokens": [early, early, late]}, golden, "bfloat16")[0]
    assert not compare(golden | {"logprobs": [[-1.0, -2.5], [-3.0], [-0.5]]}, golden, "bfloat16")[0]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_decode_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "GEMM"),
        ("_vector_kernel", "GEMM"),
        ("_gate_up_kernel", "GEMM"),
        ("_rms_norm_kernel", "other"),
        ("Memcpy HtoD (Pinned -> Device)", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert gpu_engine.kind_of_kernel(kernel) == kind


def test_a_profile_counts_overlapping_kernels_once():
    assert gpu_engine._covered([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 3.0)]) == 4.0


def test_start_up_is_read_from_the_log():
    log = gpu_engine.StartUp()
    for line in (
        "weights loaded in 3.25 s",
        "CUDA graphs: 10 captured (FULL, sizes [1, 2]) in 4.1 s, 0.50 GiB",
        "other",
    ):
        log.emit(logging.makeLogRecord({"msg": line}))
    assert log.seconds == {"weights loaded": 3.25, "CUDA graphs": 4.1}


def test_table_of_timings():
    row = {"model": "m", "ms": 2.0, "tokens_per_s": 500.0, "limit_share": 0.5, "host_ms": 0.1}
    split = {"busy_share": 0.9, "split_ms": {"attention": 1.0, "host or idle": 0.2}, "kernels_a_step": 10}
    limits = {"bandwidth": 3e12, "read": 3.1e12, "matmul": 8e14, "fp8_matmul": 15e14}
    rows = [
        {"model": "m", "limits": limits, "startup": {"all": 5.0}},
        row | {"what": "decode 1 x 1024"} | split,
        {"model": "m", "what": "decode 256 x 8192", "note": "does not fit"},
    ]
    text = markdown({"rows": rows, "settings": "level 0"})
    assert "copy 3.00 TB/s, read 3.10 TB/s, bf16 product 800 TFLOP/s, fp8 product 1500 TFLOP/s" in text
    assert "| m | decode 1 x 1024 | 2.00 ms | 500 | 50% | 0.10 ms | 90.0% |" in text
    assert "|  | decode 256 x 8192 | does not fit | | | | |" in text
    assert "| m | decode 1 x 1024 | 1.00 | 0.20 | 10 |" in text
    assert "| m | all 5.0 s |" in text
