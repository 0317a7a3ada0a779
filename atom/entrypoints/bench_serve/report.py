"""Tables for people and JSON for programs."""

import datetime
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atom import __version__
from atom.entrypoints.bench_serve.metrics import LATENCIES, Point
from atom.entrypoints.bench_serve.records import Record
from atom.entrypoints.bench_serve.session import Results
from atom.entrypoints.bench_serve.settings import BenchSettings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}


def load_text(point: Point) -> str:
    """The load of a point, as its row is called."""
    rate = "all at once" if math.isinf(point.request_rate) else f"{point.request_rate:g} req/s"
    return rate if point.max_concurrency is None else f"{rate}, at most {point.max_concurrency}"


def print_point(console: "Console", point: Point, objectives: dict[str, float]) -> None:
    """All that one point measured."""
    console.print(f"\n[bold]{load_text(point)}[/bold]: {point.ok} ok, {point.failed} failed in {point.duration:.2f} s")
    for reason, count in point.failures.items():
        console.print(f"  {count} x {reason}", style="red", markup=False, highlight=False)
    console.print(_throughput_table(point, objectives))
    if point.latencies:
        console.print(_latency_table(point))
    if not point.exact_counts:
        console.print("The server sent no usage: output tokens are counted as events, input tokens as asked for.")


def print_sweep(console: "Console", points: Sequence[Point]) -> None:
    """One row a point."""
    table = _table("load", "ok", "failed", "req/s", "output tok/s", "total tok/s")
    for heading in ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p99", "E2E p50", "E2E p99"):
        table.add_column(heading, justify="right")
    with_goodput = any(point.goodput is not None for point in points)
    if with_goodput:
        table.add_column("goodput", justify="right")
    for point in points:
        cells = [load_text(point), str(point.ok), str(point.failed)]
        cells += [_number(v) for v in (point.requests_per_s, point.output_tokens_per_s, point.total_tokens_per_s)]
        for name in LATENCIES:
            tail = point.latencies.get(name)
            if name != "itl":
                cells.append(_number(tail.median) if tail else "-")
            cells.append(_number(tail.p99) if tail else "-")
        if with_goodput:
            cells.append(_number(point.goodput or 0.0))
        table.add_row(*cells)
    console.print()
    console.print(table)
    console.print("Latencies in ms.")


def write_json(path: str, settings: BenchSettings, results: Results) -> None:
    """Raises OSError. Keys and the values of headers, which may be secret, are left out."""
    shown = {k: v for k, v in vars(settings).items() if k not in ("api_key", "headers", "objectives")}
    report: dict[str, Any] = {
        "benchmark": "serve",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "atom_version": __version__,
        "machine": _machine(),
        "server": results.server,
        "model": results.model,
        "prompt_type": results.prompt_type,
        "interrupted": results.interrupted,
        "unfinished": results.unfinished,
        "settings": shown | {"headers": sorted(settings.headers)},
        "points": [],
    }
    for point, records in zip(results.points, results.records, strict=True):
        entry = asdict(point) | {"failed": point.failed}
        entry["latencies_ms"] = entry.pop("latencies")
        if settings.save_detailed:
            entry["requests"] = _details(records)
        report["points"].append(entry)
    Path(path).write_text(json.dumps(_finite(report), indent=None if settings.save_detailed else 2) + "\n")


def _throughput_table(point: Point, objectives: dict[str, float]) -> "Table":
    headings = [
        "requests/s",
        "input tok/s",
        "output tok/s",
        "total tok/s",
        "input tokens",
        "output tokens",
        "peak open",
    ]
    cells = [
        _number(point.requests_per_s),
        _number(point.input_tokens_per_s),
        _number(point.output_tokens_per_s),
        _number(point.total_tokens_per_s),
        str(point.input_tokens),
        str(point.output_tokens),
        str(point.peak_concurrency),
    ]
    if point.goodput is not None:
        limits = ", ".join(f"{_NAMES[name]} {limit:g}" for name, limit in objectives.items())
        headings.append(f"goodput req/s ({limits} ms)")
        cells.append(_number(point.goodput))
    table = _table(*headings, left=0)
    table.add_row(*cells)
    return table


def _latency_table(point: Point) -> "Table":
    table = _table("ms", "mean", "median", "p90", "p95", "p99")
    for name, values in point.latencies.items():
        table.add_row(_NAMES[name], *(_number(v) for v in asdict(values).values()))
    return table


def _table(*headings: str, left: int = 1) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right")
    return table


def _number(value: float) -> str:
    """Four figures are more than a benchmark knows."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _details(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Seconds since the first request was sent; the events' as gaps after the first."""
    start = min(record.started for record in records)
    return [
        {
            "started": round(record.started - start, 6),
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
            "ttft": None if record.ttft is None else round(record.ttft, 6),
            "itl": [round(gap, 6) for gap in record.itl],
            "e2el": round(record.e2el, 6),
            "finish_reason": record.finish_reason,
            "error": record.error,
        }
        for record in records
    ]


def _machine() -> dict[str, Any]:
    import psutil

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _finite(value: Any) -> Any:
    """JSON has no infinity: an unlimited rate becomes "inf"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
