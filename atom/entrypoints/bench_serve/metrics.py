"""From records to the numbers of a report."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atom.entrypoints.bench_serve.records import Record
from atom.utils.errors import ConfigError

LATENCIES = ("ttft", "tpot", "itl", "e2el")
_OBJECTIVES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Distribution:
    """Of a latency, in milliseconds."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one row of a sweep measured. goodput: requests a second that met every objective; None without any.

    failures: how many requests failed for each reason. exact_counts: every answer had the server's own token counts.
    """

    request_rate: float
    max_concurrency: int | None
    ok: int
    failures: dict[str, int]
    duration: float
    peak_concurrency: int
    input_tokens: int
    output_tokens: int
    exact_counts: bool
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput: float | None
    latencies: dict[str, Distribution]

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, linear between neighbours (numpy's default)."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution(seconds: Sequence[float]) -> Distribution | None:
    """In milliseconds; None without values."""
    if not seconds:
        return None
    ordered = sorted(value * 1e3 for value in seconds)
    tails = [percentile(ordered, percent) for percent in (50, 90, 95, 99)]
    return Distribution(statistics.fmean(ordered), *tails)


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Milliseconds for each of ttft, tpot and e2el that is named, from "ttft:200". Raises ConfigError."""
    objectives: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in _OBJECTIVES or not limit > 0:
            raise ConfigError(f"goodput={text!r} must be ttft, tpot or e2el and milliseconds, such as ttft:200")
        objectives[name] = limit
    return objectives


def meets(record: Record, objectives: Mapping[str, float]) -> bool:
    """An answer of one token has no tpot, which then is met."""
    return all((getattr(record, name) or 0.0) * 1e3 <= limit for name, limit in objectives.items())


def summarize(
    records: Sequence[Record],
    *,
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
    objectives: Mapping[str, float] | None = None,
) -> Point:
    """Of the requests that ended, well or not. The duration is from the first one's sending to the last one's end."""
    ended = [record for record in records if record.ended]
    good = [record for record in ended if record.error is None]
    started = min((record.started for record in ended), default=0.0)
    duration = max((record.ended for record in ended), default=0.0) - started
    num_input = sum(record.input_tokens for record in good)
    num_output = sum(record.output_tokens for record in good)

    def rate(amount: int) -> float:
        return amount / duration if duration > 0 else 0.0

    values: dict[str, list[float]] = {
        "ttft": [t for record in good if (t := record.ttft) is not None],
        "tpot": [t for record in good if (t := record.tpot) is not None],
        "itl": [t for record in good for t in record.itl],
        "e2el": [record.e2el for record in good],
    }
    return Point(
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        ok=len(good),
        failures=dict(Counter(record.error for record in ended if record.error is not None).most_common()),
        duration=duration,
        peak_concurrency=peak_concurrency(ended),
        input_tokens=num_input,
        output_tokens=num_output,
        exact_counts=all(record.prompt_tokens is not None and record.completion_tokens is not None for record in good),
        requests_per_s=rate(len(good)),
        input_tokens_per_s=rate(num_input),
        output_tokens_per_s=rate(num_output),
        total_tokens_per_s=rate(num_input + num_output),
        goodput=rate(sum(meets(record, objectives) for record in good)) if objectives else None,
        latencies={name: d for name in LATENCIES if (d := distribution(values[name]))},
    )


def peak_concurrency(records: Sequence[Record]) -> int:
    """The most requests that were open at once."""
    changes = [(record.started, 1) for record in records] + [(record.ended, -1) for record in records]
    peak = now = 0
    for _, change in sorted(changes):  # at equal times ends come first
        now += change
        peak = max(peak, now)
    return peak
