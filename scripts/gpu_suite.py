"""Is everything right, and how fast is it, on this machine's GPU? One command, less than ten minutes.

    python scripts/gpu_suite.py [--only PART ...] [--skip PART ...] [--budget-s 560] [--json FILE] [--model FILE]

Parts: `kernels` and `engine` (correctness), `text` (real weights), `sanitizer` (memory accesses), `memory` (a random
load in a cache as large as it may be), `timings` (against limits measured in the same call). Needs torch, triton,
transformers, gguf and msgspec, no network and no server. What the time does not suffice for is named, never left out
silently. Ends with a table, the timings in Markdown and one JSON file (also in $OUT, beside the log); the exit code
is 1 if anything failed, 2 without a GPU. `--tiny` runs the same paths on a CPU, on next to nothing.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "benchmarks")]

from gpu_suite_parts.report import Report, Settings  # noqa: E402

# Parts of a stage run side by side: those of one take cores and little of the GPU.
# A part gets its seconds at most, and what later stages need at least is kept for them.
STAGES: list[dict[str, int]] = [
    {"kernels": 100},
    {"engine": 150, "text": 100, "sanitizer": 150},
    {"memory": 150},
    {"timings": 330},
]
LEAST = {"kernels": 60, "engine": 70, "text": 40, "sanitizer": 50, "memory": 50, "timings": 210}
PARTS = [part for stage in STAGES for part in stage]


def run_here(options: argparse.Namespace) -> None:
    """One part, in this process."""
    settings = Settings(
        options.seconds, tiny=options.tiny, model=options.model, level=options.level, mode=options.mode,
        workers=options.workers,
    )  # fmt: skip
    importlib.import_module(f"gpu_suite_parts.{options.run_part}").run(settings, Report(Path(options.report)))


def run_part(part: str, seconds: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One part in a process of its own, ended with all that it started when its time is up; its report."""
    file = folder / f"{part}.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--run-part", part, "--seconds", str(seconds)]
    command += ["--report", str(file), "--level", str(options.level), "--mode", options.mode]
    command += ["--workers", str(options.workers), *(["--tiny"] if options.tiny else [])]
    command += ["--model", options.model] if options.model else []
    started = time.monotonic()
    log_file = folder / f"{part}.log"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=environment(part, options, folder),
        )
        watch = threading.Timer(seconds, end_group, [process.pid])
        watch.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{part:9} | {line}", end="", flush=True)
        code = process.wait()
        watch.cancel()
        end_group(process.pid)
    took = time.monotonic() - started
    report: dict[str, Any] = {"planned": [], "cases": {}, "rows": []}
    if file.is_file():
        report = json.loads(file.read_text())
    stopped = took >= seconds and code == -signal.SIGKILL
    for name in report["planned"]:
        why = "budget" if stopped or code == 0 else "the part ended early"
        report["cases"].setdefault(name, {"status": "not run", "detail": why})
    if code and not stopped:
        detail = f"exit code {code}: {last_error(log_file)}"
        report["cases"][f"the part {part}"] = {"status": "failed", "detail": detail}
    elif not report["cases"]:
        report["cases"][part] = {"status": "not run", "detail": "budget"}
    return report | {"seconds": round(took, 1), "stopped": stopped}


def environment(part: str, options: argparse.Namespace, folder: Path) -> dict[str, str]:
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # Where packages lie in a folder that can't be written, each process would compile all of torch's Python again.
    settings["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    if part in ("kernels", "engine", "sanitizer"):
        settings["OMP_NUM_THREADS"] = "1"  # as many processes as cores
    if options.tiny:
        settings |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | settings


def end_group(group: int) -> None:
    """End a part and whatever it left running: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def run_stages(parts: list[str], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    deadline = time.monotonic() + options.budget_s
    stages = [{p: s for p, s in stage.items() if p in parts} for stage in STAGES]
    reports: dict[str, Any] = {}
    for index, stage in enumerate(stages):
        kept = sum(max((LEAST[p] for p in later), default=0) for later in stages[index + 1 :])
        left = deadline - time.monotonic()
        # Alone, a part may use all that there is.
        share = left - kept if not options.tiny else left
        threads = []
        for part, most in stage.items():
            seconds = min(most, share) if len(parts) > 1 else left
            if seconds < min(10, LEAST[part]):
                reports[part] = {"cases": {part: {"status": "not run", "detail": "budget"}}, "rows": [], "seconds": 0}
                continue

            def work(part: str = part, seconds: float = seconds) -> None:
                reports[part] = run_part(part, seconds, options, folder)

            threads.append(threading.Thread(target=work))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for part in stage:
            save(options, reports, folder)
            print(f"{part:9} | took {reports[part]['seconds']} s", flush=True)
    return {part: reports[part] for part in PARTS if part in reports}


def save(options: argparse.Namespace, reports: dict[str, Any], folder: Path) -> None:
    text = json.dumps({"machine": machine(), "command": " ".join(sys.argv), "parts": reports}, indent=1)
    targets = [Path(options.json)] if options.json else []
    if out := os.environ.get("OUT"):
        targets.append(Path(out) / "gpu_suite.json")
        logs = [f"==== {log.stem}\n{log.read_text(errors='replace')}" for log in sorted(folder.glob("*.log"))]
        (Path(out) / "gpu_suite.log").write_text("".join(logs))
    for target in targets:
        target.write_text(text + "\n")


@functools.cache
def machine() -> dict[str, str]:
    import platform

    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device, "torch": torch.__version__, "triton": triton_version, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def summarize(reports: dict[str, Any]) -> int:
    """Prints what failed, what was not run and why, and a line a part; the number of failures."""
    failures = 0
    reasons: dict[tuple[str, str], list[str]] = {}
    table = []
    for part, report in reports.items():
        counts = dict.fromkeys(("ok", "failed", "not run"), 0)
        for name, case in report["cases"].items():
            counts[case["status"]] += 1
            if case["status"] == "failed":
                print(f"FAILED {part}: {name}: {case['detail']}")
            elif case["status"] == "not run":
                reasons.setdefault((part, case["detail"]), []).append(name)
        failures += counts["failed"]
        table.append(
            f"{part:10} {counts['ok']:6} {counts['failed']:7} {counts['not run']:8} {report['seconds']:7.0f} s"
        )
    for (part, reason), names in reasons.items():
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        print(f"NOT RUN {part}: {'; '.join(names[:6])}{more}: {reason}")
    print(f"\n{'part':10} {'ok':>6} {'failed':>7} {'not run':>8}")
    print("\n".join(table), flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS, metavar="PART")
    parser.add_argument("--budget-s", type=float, default=560)
    parser.add_argument("--json", help="where to write the report (the default: $OUT alone)")
    parser.add_argument("--model", help="for `text`: a GGUF file, or a folder with one or with its parts")
    parser.add_argument("--level", type=int, default=0, help="compilation level, for `timings` and `memory`")
    parser.add_argument("--mode", default="FULL_DECODE_ONLY", help="CUDA graph mode, likewise")
    parser.add_argument("--workers", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with next to nothing to do")
    for name in ("--run-part", "--report"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_part:
        run_here(options)
        return 0
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        print("gpu_suite: no GPU here; --tiny runs the same paths on the CPU", file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    parts = [part for part in PARTS if part in options.only and part not in options.skip]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reports = run_stages(parts, options, folder)
        save(options, reports, folder)
    failures = summarize(reports)
    if "timings" in reports:
        from gpu_suite_parts.timings import markdown

        print("\n" + markdown(reports["timings"]), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
