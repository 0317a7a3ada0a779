"""Prometheus metrics under vLLM's names with the prefix atom:, and the line of statistics in the log."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from atom.model_engine.protocol import EngineRequest, StepOutputs

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_FIRST_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
_REQUEST_SECONDS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts by upper bound; an observation is a bisection and two additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        result: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            running += count
            result.append((bound, running))
        return result


@dataclass(slots=True)
class _Timeline:
    """A running request."""

    num_prompt_tokens: int
    arrival: float
    last: float = 0.0
    first: float = 0.0
    num_tokens: int = 0


class Metrics:
    """Listens to an AsyncLLMEngine (EngineListener) and is a collector for prometheus_client."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._running: dict[str, _Timeline] = {}
        self.stats: dict[str, float] = {}  # the engine's, brought up to date before it is collected
        self.prompt_tokens = self.generation_tokens = 0
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self._lost_counts: Counter[str] = Counter()  # of cores that are gone
        self._last_counts: dict[str, float] = {}
        self.time_to_first_token = Histogram(_FIRST_SECONDS)
        self.inter_token_latency = Histogram(_TOKEN_SECONDS)
        self.time_per_output_token = Histogram(_TOKEN_SECONDS)
        self.e2e_request_latency = Histogram(_REQUEST_SECONDS)
        self.request_prompt_tokens = Histogram(_TOKENS)
        self.request_generation_tokens = Histogram(_TOKENS)

    # -- EngineListener --

    def submitted(self, requests: Sequence[EngineRequest]) -> None:
        now = time.monotonic()
        for request in requests:
            self._running[request.request_id] = _Timeline(len(request.prompt_token_ids), now)

    def stepped(self, outputs: StepOutputs) -> None:
        now = time.monotonic()
        for output in outputs:
            timeline = self._running.get(output.request_id)
            if timeline is None:
                continue
            count = len(output.new_token_ids)
            if count:
                if timeline.num_tokens:
                    self.inter_token_latency.observe((now - timeline.last) / count)
                else:
                    timeline.first = now
                    self.prompt_tokens += timeline.num_prompt_tokens
                    self.time_to_first_token.observe(now - timeline.arrival)
                timeline.last = now
                timeline.num_tokens += count
                self.generation_tokens += count
            if output.finish_reason is not None:
                self._finish(output.request_id, output.finish_reason, now)

    def ended(self, request_ids: Sequence[str], reason: str) -> None:
        for request_id in request_ids:
            if request_id in self._running:
                self._finish(request_id, reason, time.monotonic())

    def _finish(self, request_id: str, reason: str, now: float) -> None:
        timeline = self._running.pop(request_id)
        self.finished[reason] += 1
        if reason in ("abort", "error"):
            return
        self.e2e_request_latency.observe(now - timeline.arrival)
        self.request_prompt_tokens.observe(timeline.num_prompt_tokens)
        self.request_generation_tokens.observe(timeline.num_tokens)
        if timeline.num_tokens > 1:
            self.time_per_output_token.observe((timeline.last - timeline.first) / (timeline.num_tokens - 1))

    # -- collector --

    def _counts(self) -> dict[str, float]:
        """The core's counters, which start over with a new core: never falling here."""
        counts = {name: self.stats.get(name, 0) for name in ("preemptions", "prefix_queries", "prefix_hits")}
        for name, value in counts.items():
            last = self._last_counts.get(name, 0)
            if value < last:
                self._lost_counts[name] += int(last)
        self._last_counts = counts
        return {name: value + self._lost_counts[name] for name, value in counts.items()}

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        names, values = list(self._labels), list(self._labels.values())
        stats, counts = self.stats, self._counts()
        for name, text, gauge in (
            ("num_requests_running", "Requests in the batch", stats.get("running", 0)),
            ("num_requests_waiting", "Requests that wait for their turn", stats.get("waiting", 0)),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", stats.get("kv_cache_usage", 0)),
            ("engine_up", "1 while an engine core serves", stats.get("up", 1)),
        ):
            family = GaugeMetricFamily(f"atom:{name}", text, labels=names)
            family.add_metric(values, gauge)
            yield family
        for name, text, count in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", counts["prefix_queries"]),
            ("prefix_cache_hits", "Prompt tokens found there", counts["prefix_hits"]),
            ("num_preemptions", "Requests put back for want of cache", counts["preemptions"]),
            ("prompt_tokens", "Prompt tokens computed or found in the cache", self.prompt_tokens),
            ("generation_tokens", "Tokens generated", self.generation_tokens),
            ("engine_restarts", "Engine cores that replaced a dead one", stats.get("restarts", 0)),
        ):
            counter = CounterMetricFamily(f"atom:{name}", text, labels=names)
            counter.add_metric(values, count)
            yield counter
        ends = CounterMetricFamily(
            "atom:request_success", "Requests that ended, by reason", labels=[*names, "finished_reason"]
        )
        for reason, count in self.finished.items():
            ends.add_metric([*values, reason], count)
        yield ends
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token", self.time_to_first_token),
            ("inter_token_latency_seconds", "Between tokens of a request", self.inter_token_latency),
            ("time_per_output_token_seconds", "Mean time of a token after the first", self.time_per_output_token),
            ("request_time_per_output_token_seconds", "The same, by its newer name", self.time_per_output_token),
            ("e2e_request_latency_seconds", "From arrival to the last token", self.e2e_request_latency),
            ("request_prompt_tokens", "Prompt lengths", self.request_prompt_tokens),
            ("request_generation_tokens", "Answer lengths", self.request_generation_tokens),
        ):
            times = HistogramMetricFamily(f"atom:{name}", text, labels=names)
            times.add_metric(values, histogram.buckets(), histogram.total)
            yield times

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(_Registry(self))


class _Registry:
    """What generate_latest needs of a registry: no global state."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Any]:
        return self._metrics.collect()


class StatisticsLine:
    """The log's line: rates since the last one, or "" when nothing has happened."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = (time.monotonic(), metrics.prompt_tokens, metrics.generation_tokens)

    def next(self, stats: dict[str, float]) -> str:
        metrics = self._metrics
        now, prompt, generation = time.monotonic(), metrics.prompt_tokens, metrics.generation_tokens
        then, prompt_before, generation_before = self._last
        self._last = (now, prompt, generation)
        seconds = max(now - then, 1e-9)
        busy = stats.get("running", 0) or stats.get("waiting", 0)
        if not busy and prompt == prompt_before and generation == generation_before:
            return ""
        return (
            f"prompt {(prompt - prompt_before) / seconds:.1f} tokens/s, "
            f"generation {(generation - generation_before) / seconds:.1f} tokens/s, "
            f"running {stats.get('running', 0):.0f}, waiting {stats.get('waiting', 0):.0f}, "
            f"KV cache {100 * stats.get('kv_cache_usage', 0):.1f}%, "
            f"prefix hits {100 * stats.get('prefix_hit_rate', 0):.1f}%"
        )
