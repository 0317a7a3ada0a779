"""A PNG of a sweep: throughput and latency over the load. Needs the extra `bench`."""

import importlib.util
from collections.abc import Sequence

from atom.entrypoints.bench_serve.metrics import Point
from atom.utils.errors import ConfigError


def check_available() -> None:
    """Raises ConfigError before a benchmark that could not be drawn after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib, which is not installed: pip install 'atom-inference[bench]'")


def write_plot(path: str, points: Sequence[Point], title: str) -> None:
    """Three panels, one place on the x axis for each point. Raises OSError, and ValueError for an unknown suffix."""
    from matplotlib.figure import Figure

    places = range(len(points))
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title)
    throughput, ttft, tpot = figure.subplots(1, 3)
    throughput.plot(places, [point.output_tokens_per_s for point in points], marker="o", label="output tokens/s")
    throughput.plot(places, [point.total_tokens_per_s for point in points], marker="o", label="all tokens/s")
    throughput.set_ylabel("tokens/s")
    if any(point.goodput is not None for point in points):
        requests = throughput.twinx()
        requests.plot(places, [point.goodput or 0.0 for point in points], "k--", marker="s", label="goodput (right)")
        requests.set_ylabel("requests/s")
        requests.set_ylim(bottom=0)
        requests.legend(loc="lower right")
    throughput.legend(loc="upper left")
    for axes, name, label in ((ttft, "ttft", "time to first token"), (tpot, "tpot", "time per output token")):
        for part in ("median", "p90", "p95", "p99"):
            drawn = [
                (place, point.latencies[name])
                for place, point in zip(places, points, strict=True)
                if name in point.latencies
            ]
            axes.plot([p for p, _ in drawn], [getattr(values, part) for _, values in drawn], marker="o", label=part)
        axes.set_ylabel(f"{label}, ms")
        axes.legend()
    for axes in (throughput, ttft, tpot):
        axes.set_xticks(list(places), [_tick(point) for point in points])
        axes.set_xlabel("requests/s offered / most at once")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _tick(point: Point) -> str:
    return f"{point.request_rate:g} / {point.max_concurrency or 'any'}"
