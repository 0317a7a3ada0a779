"""benchmarks/gpu_engine.py's lines for four models, one engine at a time, and their table for docs/performance.md."""

import os
from typing import Any

from gpu_engine import GRAPH_SIZES, describe, run_apart

from gpu_suite_parts.report import Report, Settings

# (model, arguments, seconds that it takes as a rule); the goals' lines come first.
JOBS: list[tuple[str, list[str], int]] = [
    ("qwen3-0.6b", [], 50),
    ("qwen3-8b", ["--no-mixed"], 55),
    ("qwen3-0.6b", ["--kv-cache-dtype", "fp8", "--batches", "--prefills"], 25),
    ("llama-3.1-8b", ["--no-mixed"], 55),
    ("qwen3-30b-a3b", ["--no-mixed"], 55),
]
TINY = ["--batches", "1", "2", "--contexts", "40", "--prefills", "20"]
FUSION = "ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION"
_LEAST = 20  # seconds, to start an engine and measure something


def run(settings: Settings, report: Report) -> None:
    jobs = [("tiny", TINY, 5)] if settings.tiny else JOBS
    # The fastest configuration: a switch that is off by default.
    os.environ.setdefault(FUSION, "1")
    common = ["--level", str(settings.level), "--mode", settings.mode]
    report.note(
        "settings", f"level {settings.level}, {settings.mode}, graphs for {GRAPH_SIZES}, {FUSION}={os.environ[FUSION]}"
    )
    report.plan([title(job) for job in jobs])
    for index, job in enumerate(jobs):
        name, arguments, _ = job
        # Its share of what is left.
        seconds = (settings.left - 5) * job[2] / sum(later[2] for later in jobs[index:])
        if seconds < _LEAST and not settings.tiny:
            report.case(title(job), "not run", "budget")
            continue
        error, lines = "", 0
        for row in run_apart(name, [*arguments, *common, "--seconds", str(seconds)]):
            report.row(row)
            if "error" in row:
                error = row["error"]
            elif "startup" in row:
                print(f"{name}: limits {rates(row['limits'])}; start-up {seconds_of(row['startup'])}", flush=True)
            else:
                print(describe(row), flush=True)
                lines += 1
                if "budget" in row.get("note", ""):
                    report.case(f"{name}: {row['what']}", "not run", "budget", quiet=True)
        report.case(title(job), "failed" if error else "ok", error or f"{lines} lines")


def title(job: tuple[str, list[str], int]) -> str:
    name, arguments, _ = job
    return f"{name}, fp8 cache" if "fp8" in arguments else name


def rates(limits: dict[str, float]) -> str:
    text = f"copy {limits['bandwidth'] / 1e12:.2f} TB/s, read {limits['read'] / 1e12:.2f} TB/s"
    text += f", bf16 product {limits['matmul'] / 1e12:.0f} TFLOP/s"
    return text + (f", fp8 product {limits['fp8_matmul'] / 1e12:.0f} TFLOP/s" if "fp8_matmul" in limits else "")


def seconds_of(startup: dict[str, float]) -> str:
    return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in startup.items())


def markdown(report: dict[str, Any]) -> str:
    """The table, and below it where the time of the lines goes that were profiled."""
    rows = report["rows"]
    lines = [f"Limits: {rates(row['limits'])}." for row in rows if "limits" in row][:1]
    lines += [f"Settings: {report.get('settings', '')}.", ""]
    lines += ["| Model | Work | Time | Tokens/s | Of the limit | Host a step | Device busy |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    last = None
    for row in rows:
        if "what" not in row:
            continue
        name = "" if row["model"] == last else row["model"]
        last = row["model"]
        if "ms" not in row or not row["ms"]:
            lines.append(f"| {name} | {row['what']} | {row.get('note') or row.get('error')} | | | | |")
            continue
        time = f"{row['ms']:.2f} ms" if row["ms"] < 1000 else f"{row['ms'] / 1e3:.2f} s"
        busy = f"{row['busy_share']:.1%}" if "busy_share" in row else ""
        lines.append(
            f"| {name} | {row['what']} | {time} | {row['tokens_per_s']:,.0f} | {row['limit_share']:.0%} | "
            f"{row['host_ms']:.2f} ms | {busy} |"
        )
    split = [row for row in rows if "split_ms" in row]
    if split:
        lines += ["", "| Model | Work | " + " | ".join(f"{name}, ms" for name in split[0]["split_ms"]) + " | Kernels |"]
        lines += ["| --- " * (3 + len(split[0]["split_ms"])) + "|"]
        for row in split:
            parts = " | ".join(f"{value:.2f}" for value in row["split_ms"].values())
            lines.append(f"| {row['model']} | {row['what']} | {parts} | {row['kernels_a_step']:.0f} |")
    starts = [row for row in rows if "startup" in row]
    if starts:
        lines += ["", "| Start of | Seconds |", "| --- | --- |"]
        lines += [f"| {row['model']} | {seconds_of(row['startup'])} |" for row in starts]
    return "\n".join(lines)
