"""What `atom bench serve` can be told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from atom.entrypoints.bench_serve.metrics import parse_goodput
from atom.utils.errors import ConfigError

DATASETS = ("random", "sharegpt", "prefix")
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


@dataclass(kw_only=True)
class BenchSettings:
    """Every combination of request_rate and max_concurrency is one point of a sweep.

    output_len: None means 128, or for sharegpt the length of the answer in the file.
    """

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = "/v1/completions"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    dataset: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 200
    input_len: int = 128
    output_len: int | None = None
    range_ratio: float = 0.0
    prompt_type: str = "auto"
    vocab_size: int = 32000
    num_prefixes: int = 4
    prefix_len: int = 256
    max_total_len: int = 2048
    request_rate: Sequence[float] = (math.inf,)
    burstiness: float = 1.0
    max_concurrency: Sequence[int | None] = (None,)
    warmup: int = 1
    seed: int = 0
    temperature: float | None = None
    ignore_eos: bool = False
    reset_prefix_cache: bool = False
    timeout: float = 3600.0
    connect_timeout: float = 30.0
    insecure: bool = False
    ca_file: str | None = None
    goodput: Sequence[str] = ()
    json: str | None = None
    plot: str | None = None
    save_detailed: bool = False

    def __post_init__(self) -> None:
        for name, low in (
            ("num_prompts", 1), ("input_len", 1), ("output_len", 1), ("vocab_size", 2), ("num_prefixes", 1),
            ("prefix_len", 1), ("max_total_len", 1), ("warmup", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}={value} must be at least {low}")
        for name in ("timeout", "connect_timeout", "burstiness"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        for rate in self.request_rate:
            if not rate > 0:
                raise ConfigError(f"request_rate={rate} must be above 0 requests a second, or inf")
        for places in self.max_concurrency:
            if places is not None and places < 1:
                raise ConfigError(f"max_concurrency={places} must be at least 1")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio={self.range_ratio} must be at least 0 and below 1")
        if self.temperature is not None and not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} must be at least 0")
        if not self.endpoint.startswith("/"):
            raise ConfigError(f"endpoint={self.endpoint!r} must be a path such as {' or '.join(ENDPOINTS)}")
        if self.dataset == "sharegpt" and not self.dataset_path:
            raise ConfigError("dataset_path is missing; dataset='sharegpt' needs a JSON file of conversations")
        if self.dataset != "sharegpt" and self.dataset_path:
            raise ConfigError(f"dataset_path={self.dataset_path!r} needs dataset='sharegpt', not {self.dataset!r}")
        if self.chat and self.prompt_type == "ids":
            raise ConfigError("prompt_type='ids' needs endpoint='/v1/completions'; a chat takes only text")
        self.objectives = parse_goodput(self.goodput)

    @property
    def chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    @property
    def points(self) -> list[tuple[float, int | None]]:
        return [(rate, places) for rate in self.request_rate for places in self.max_concurrency]
