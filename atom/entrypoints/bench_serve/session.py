"""A whole benchmark: ask the server, warm it up, run each point of the sweep."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from atom.entrypoints.bench_serve import workload
from atom.entrypoints.bench_serve.client import Client, ConnectionFailedError
from atom.entrypoints.bench_serve.events import error_text
from atom.entrypoints.bench_serve.metrics import Point, summarize
from atom.entrypoints.bench_serve.records import Prompt, Record
from atom.entrypoints.bench_serve.runner import request_body, run_load
from atom.entrypoints.bench_serve.settings import BenchSettings
from atom.utils.errors import ConfigError

_WARMUP_SEED = -1


@dataclass
class Results:
    """records: of each point. server: what its /version says, if anything. prompt_type: what was sent."""

    model: str = ""
    server: dict[str, Any] = field(default_factory=dict)
    prompt_type: str = ""
    points: list[Point] = field(default_factory=list)
    records: list[list[Record]] = field(default_factory=list)
    unfinished: int = 0  # requests cut off, or never sent, because the benchmark was interrupted
    interrupted: bool = False


class Session:
    """report: called with each point as soon as it is measured."""

    def __init__(self, settings: BenchSettings, report: Callable[[Point], None]) -> None:
        self.settings = settings
        self.results = Results()
        self._report = report
        self._pairs = workload.load_sharegpt(settings.dataset_path) if settings.dataset_path else []
        headers = dict(settings.headers)
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self._client = Client(
            settings.base_url,
            headers,
            timeout=settings.timeout,
            connect_timeout=settings.connect_timeout,
            tls=_tls(settings),
        )

    async def run(self) -> None:
        """Cancelled, it summarizes what the current point has measured and returns."""
        try:
            await self._prepare()
            for index, (rate, places) in enumerate(self.settings.points):
                await self._run_point(index, rate, places)
        except asyncio.CancelledError:
            self.results.interrupted = True
        finally:
            self._client.close()

    async def _prepare(self) -> None:
        settings, results = self.settings, self.results
        # Some servers have no list of models; then its error is the clearer one.
        status, body = await self._ask("GET", "/v1/models")
        if settings.model:
            results.model = settings.model
        elif status != 200:
            hint = "" if status in (401, 403) else "; name a model by --model"
            raise ConfigError(f"{self._client.base_url}/v1/models answers {status}: {error_text(body)}{hint}")
        else:
            results.model = _first_model(body, self._client.base_url)
        status, body = await self._ask("GET", "/version")
        if status == 200:
            results.server = _object(body)
        results.prompt_type = await self._prompt_type()
        await self._warm_up()

    async def _prompt_type(self) -> str:
        settings = self.settings
        if settings.dataset == "sharegpt":
            return "text"
        if settings.prompt_type != "auto":
            return settings.prompt_type
        if settings.chat:
            return "words"
        # Whether ids are taken, and the vocabulary has as many, shows in an answer to the greatest.
        record = Record(output_len=1)
        await self._client.stream(
            self._encode(Prompt(prompt=[settings.vocab_size - 1], input_len=1, output_len=1)), record
        )
        return "words" if (record.error or "").startswith(("HTTP 400", "HTTP 422")) else "ids"

    async def _warm_up(self) -> None:
        prompts = self._prompts(self.settings.warmup, _WARMUP_SEED)
        records = _records(prompts)
        requests = [self._encode(prompt) for prompt in prompts]
        await run_load(self._client, requests, records, [0.0] * len(prompts), None)
        for record in records:
            if record.error:
                raise ConfigError(
                    f"the warm-up failed: {record.error} ({self._client.base_url}{self.settings.endpoint})"
                )

    async def _run_point(self, index: int, rate: float, places: int | None) -> None:
        settings = self.settings
        if settings.reset_prefix_cache:
            status, body = await self._ask("POST", "/reset_prefix_cache")
            if status != 200:
                raise ConfigError(f"reset_prefix_cache: the server answers {status}: {error_text(body)}")
        # Each point has prompts of its own, or it would find those of the one before in the server's prefix cache.
        prompts = self._prompts(settings.num_prompts, settings.seed + index)
        arrivals = workload.arrival_times(len(prompts), rate, settings.burstiness, seed=settings.seed + index)
        records = _records(prompts)
        requests = [self._encode(prompt) for prompt in prompts]
        try:
            await run_load(self._client, requests, records, arrivals, places)
        finally:
            self.results.unfinished += sum(not record.ended for record in records)
            ended = [record for record in records if record.ended]
            if ended:
                point = summarize(ended, request_rate=rate, max_concurrency=places, objectives=settings.objectives)
                self.results.points.append(point)
                self.results.records.append(ended)
                self._report(point)

    def _prompts(self, count: int, seed: int) -> list[Prompt]:
        settings = self.settings
        if settings.dataset == "sharegpt":
            return workload.sharegpt_prompts(
                self._pairs, count, output_len=settings.output_len, max_len=settings.max_total_len, seed=seed
            )
        common: dict[str, Any] = {
            "input_len": settings.input_len,
            "output_len": settings.output_len or 128,
            "range_ratio": settings.range_ratio,
            "vocab_size": settings.vocab_size if self.results.prompt_type == "ids" else None,
            "seed": seed,
        }
        if settings.dataset == "prefix":
            return workload.prefix_prompts(
                count, num_prefixes=settings.num_prefixes, prefix_len=settings.prefix_len, **common
            )
        return workload.random_prompts(count, **common)

    def _encode(self, prompt: Prompt) -> bytes:
        settings = self.settings
        options = {} if settings.temperature is None else {"temperature": settings.temperature}
        body = request_body(
            prompt, chat=settings.chat, model=self.results.model, ignore_eos=settings.ignore_eos, options=options
        )
        return self._client.encode("POST", settings.endpoint, body)

    async def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        try:
            return await self._client.send(self._client.encode(method, path))
        except (ConnectionFailedError, TimeoutError) as error:
            raise ConfigError(f"base_url={self.settings.base_url!r}: {error or 'no answer in time'}") from None


def _records(prompts: list[Prompt]) -> list[Record]:
    return [Record(output_len=prompt.output_len, input_len=prompt.input_len) for prompt in prompts]


def _first_model(body: bytes, base_url: str) -> str:
    models = _object(body).get("data")
    first = models[0] if isinstance(models, list) and models else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise ConfigError(f"{base_url}/v1/models lists no model; name one by --model")
    return str(first["id"])


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return {}
    return value if isinstance(value, dict) else {}


def _tls(settings: BenchSettings) -> ssl.SSLContext | None:
    if not settings.base_url.startswith("https"):
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise ConfigError(f"ca_file={settings.ca_file!r}: {error.strerror or error}") from None
    if settings.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
