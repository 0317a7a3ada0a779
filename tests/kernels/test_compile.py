"""The Triton kernels compile for GPUs, which no run in the interpreter shows."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def compile_kernels(cache: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), *flags]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_attention_compiles(tmp_path: Path) -> None:
    flags = ["--filter", "paged_attention", "--every", "2"]
    with ThreadPoolExecutor() as threads:  # compiling takes one core
        halves = list(threads.map(lambda first: compile_kernels(tmp_path, *flags, "--first", first), "01"))
    assert [done.returncode for done in halves] == [0, 0], [done.stdout + done.stderr for done in halves]
    compiled = {word for done in halves for word in done.stdout.split()}
    assert {"_decode_kernel", "_merge_kernel", "_prefill_kernel"} <= compiled


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_all_kernels_compile(tmp_path: Path, target: str) -> None:
    done = compile_kernels(tmp_path, "--target", target)
    assert done.returncode == 0, done.stdout + done.stderr
    sources = "\n".join(path.read_text() for path in (ROOT / "atom/kernels/triton").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    if target.startswith("hip"):
        kernels.remove("decode_float8_kernel")  # written with the layouts of NVIDIA's matrix instruction
    assert kernels <= set(done.stdout.split())
