"""Runs a step on the workers. Here: one worker in this process."""

from abc import ABC, abstractmethod
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

    @abstractmethod
    def execute(self, batch: ScheduledBatch) -> ModelOutput: ...

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

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        return self._runner.execute(batch)

    def start_profile(self) -> None:
        self._runner.start_profile()

    def stop_profile(self) -> str | None:
        return self._runner.stop_profile()


def make_executor(config: "Config") -> Executor:
    return UniprocExecutor(config)
