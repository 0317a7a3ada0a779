"""How a front end talks to the engine core: the same calls whether it is in this process or not."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

from atom.config import Config
from atom.model_engine.protocol import EngineOutput, EngineRequest


class EngineClient(ABC):
    @abstractmethod
    def add_request(self, request: EngineRequest) -> None: ...

    @abstractmethod
    def abort(self, request_ids: list[str]) -> None:
        """Unknown or finished ids are ignored."""

    @abstractmethod
    def step(self) -> list[EngineOutput]:
        """Outputs of the next engine step; [] when idle."""

    @abstractmethod
    def has_unfinished(self) -> bool: ...

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """False (and nothing happens) while requests run."""

    @abstractmethod
    def start_profile(self) -> None: ...

    @abstractmethod
    def stop_profile(self) -> str | None: ...

    @abstractmethod
    def stats(self) -> dict[str, float]: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The memory plan: blocks, bytes, and why."""

    @abstractmethod
    def close(self) -> None: ...


class InprocClient(EngineClient):
    """The engine core in this process: every call is direct."""

    def __init__(self, config: Config) -> None:
        from atom.model_engine.engine_core import EngineCore

        self.core = EngineCore(config)

    def add_request(self, request: EngineRequest) -> None:
        self.core.add_request(request)

    def abort(self, request_ids: list[str]) -> None:
        self.core.abort(request_ids)

    def step(self) -> list[EngineOutput]:
        return self.core.step()

    def has_unfinished(self) -> bool:
        return self.core.has_unfinished()

    def reset_prefix_cache(self) -> bool:
        return self.core.reset_prefix_cache()

    def start_profile(self) -> None:
        self.core.start_profile()

    def stop_profile(self) -> str | None:
        return self.core.stop_profile()

    def stats(self) -> dict[str, float]:
        return self.core.stats()

    def describe(self) -> dict[str, Any]:
        plan = self.core.plan
        return {**asdict(plan), "cache_bytes": plan.cache_bytes, "num_cached_tokens": plan.num_cached_tokens}

    def close(self) -> None:
        self.core.close()


def make_client(config: Config) -> EngineClient:
    return InprocClient(config)
