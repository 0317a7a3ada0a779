"""Runs a step on the workers. Here: one worker in this process."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from atom.model_engine.protocol import ModelOutput, ScheduledBatch

if TYPE_CHECKING:
    from atom.config import Config
    from atom.model_engine.kv_cache import MemoryPlan


class Executor(ABC):
    """What the engine core needs of its workers, wherever they run."""

    @abstractmethod
    def initialize(self) -> "MemoryPlan":
        """Load the model, size and allocate the cache."""

    @property
    @abstractmethod
    def max_in_flight(self) -> int:
        """Steps that may be submitted before the first one's result is asked for."""

    @abstractmethod
    def submit(self, batch: ScheduledBatch) -> Callable[[], ModelOutput]:
        """Start a step; calling the result waits for it. Steps run in the order submitted."""

    @abstractmethod
    def forget_requests(self) -> None:
        """Drop every request, after a step that failed half-way."""

    @abstractmethod
    def start_profile(self) -> None: ...

    @abstractmethod
    def stop_profile(self) -> str | None:
        """The trace's path, or None when none was running."""

    def close(self) -> None:  # noqa: B027 - nothing to release by default
        pass


class UniprocExecutor(Executor):
    """One worker, called directly."""

    def __init__(self, config: "Config") -> None:
        from atom.model_engine.model_runner import ModelRunner

        self._runner = ModelRunner(config)

    def initialize(self) -> "MemoryPlan":
        return self._runner.initialize()

    @property
    def max_in_flight(self) -> int:
        return self._runner.max_in_flight

    def submit(self, batch: ScheduledBatch) -> Callable[[], ModelOutput]:
        return self._runner.submit(batch)

    def forget_requests(self) -> None:
        self._runner.forget_requests()

    def start_profile(self) -> None:
        self._runner.start_profile()

    def stop_profile(self) -> str | None:
        return self._runner.stop_profile()

    def close(self) -> None:
        self._runner.stop_profile()  # a trace that nobody stopped is written all the same


def make_executor(config: "Config") -> Executor:
    return UniprocExecutor(config)
