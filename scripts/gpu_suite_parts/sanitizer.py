"""compute-sanitizer's memcheck on every Triton kernel, at a few small shapes."""

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from gpu_suite_parts.report import ROOT, Report, Settings

_TOOL = "compute-sanitizer"
_ERROR_CODE = 97


def find_tool() -> str | None:
    return shutil.which(_TOOL) or shutil.which(_TOOL, path="/usr/local/cuda/bin:/opt/cuda/bin")


def run(settings: Settings, report: Report) -> None:
    import gpu_check

    kernels = sorted({case[0] for case in gpu_check.cases()})
    report.plan(kernels)
    tool = find_tool()
    if tool is None or settings.tiny:
        why = f"{_TOOL} is neither on PATH nor in /usr/local/cuda/bin" if tool is None else "there is no GPU"
        for kernel in kernels:
            report.case(kernel, "not run", f"not available: {why}", quiet=True)
        print(f"not available: {why}", flush=True)
        return
    with ThreadPoolExecutor(min(settings.workers, len(kernels))) as threads:
        check = functools.partial(check_kernel, tool, settings)
        for future in as_completed([threads.submit(check, kernel) for kernel in kernels]):
            report.case(*future.result())


def check_kernel(tool: str, settings: Settings, kernel: str) -> tuple[str, str, str]:
    """(kernel, status, detail)"""
    started = time.monotonic()
    command = [tool, "--tool", "memcheck", f"--error-exitcode={_ERROR_CODE}", sys.executable]
    command += [str(ROOT / "scripts" / "gpu_check.py"), "--run-small", kernel]
    # Blocks that the caching allocator keeps would hide accesses beyond a tensor.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=max(1, settings.left - 3))
    except subprocess.TimeoutExpired:
        return kernel, "not run", "budget"
    return kernel, *verdict(done.stdout + done.stderr, done.returncode, time.monotonic() - started)


def verdict(output: str, code: int, seconds: float = 0.0) -> tuple[str, str]:
    """(status, detail) of memcheck's output and exit code."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    first = next((line.lstrip("= ") for line in output.splitlines() if re.search(r"Invalid|Misaligned", line)), "")
    if re.search(
        r"Device not supported|not supported on this|Unable to find injection|insufficient permission", output
    ):
        return "not run", "not available: " + next(
            line.lstrip("= ") for line in output.splitlines() if re.search(r"supported|injection|permission", line)
        )
    if summary is None:
        return "failed", f"exit code {code} without a summary: {' '.join(output.split())[-200:]}"
    if int(summary[1]):
        return "failed", f"{summary[1]} errors: {first}"
    if code:
        return "failed", f"clean, but the checks failed: {' '.join(output.split())[-200:]}"
    return "ok", f"clean ({seconds:.0f} s)"
