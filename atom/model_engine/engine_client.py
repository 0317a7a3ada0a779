"""How a front end talks to the engine core: the same calls whether it is in this process or not."""

from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from atom.config import Config
from atom.model_engine import wire
from atom.model_engine.protocol import EngineRequest, StepOutputs
from atom.utils import startup


class EngineClient(ABC):
    @abstractmethod
    def add_request(self, request: EngineRequest) -> None: ...

    @abstractmethod
    def abort(self, request_ids: list[str]) -> None:
        """Unknown or finished ids are ignored."""

    @abstractmethod
    def step(self) -> StepOutputs:
        """Outputs of the next engine step; empty when idle."""

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

    @property
    @abstractmethod
    def startup(self) -> dict[str, float]:
        """Seconds by phase of the engine core's start, and their "total"."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The memory plan: blocks, bytes, and why."""

    @abstractmethod
    def close(self) -> None: ...


class InprocClient(EngineClient):
    """The engine core in this process: every call is direct."""

    def __init__(self, config: Config) -> None:
        with startup.phase("import atom"):
            from atom.model_engine.engine_core import EngineCore

        self.core = EngineCore(config)

    def add_request(self, request: EngineRequest) -> None:
        self.core.add_request(request)

    def abort(self, request_ids: list[str]) -> None:
        self.core.abort(request_ids)

    def step(self) -> StepOutputs:
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

    @property
    def startup(self) -> dict[str, float]:
        return self.core.startup

    def describe(self) -> dict[str, Any]:
        return self.core.describe()

    def close(self) -> None:
        self.core.close()


class ProcessClient(EngineClient):
    """The engine core in a process of its own (see core_connection). Not thread-safe.

    Raises CoreStartError where the core refuses a setting, EngineDeadError once it is gone.
    """

    def __init__(self, config: Config) -> None:
        from atom.model_engine.core_connection import CoreConnection

        self._core = CoreConnection(config)
        self._running: set[str] = set()
        self._outputs: deque[StepOutputs] = deque()
        self._stats: dict[str, float] = {}
        self._num_calls = 0
        try:
            with startup.phase("engine process"):
                ready = self._core.wait_ready()
            self._plan, self._startup = ready.plan, ready.startup
            if (timer := startup.current()) is not None:
                timer.split_up("engine process", ready.startup, "engine: ")
        except BaseException:
            self._core.close(grace=0)
            raise

    def add_request(self, request: EngineRequest) -> None:
        self._running.add(request.request_id)
        self._core.send(wire.AddRequest(request))

    def abort(self, request_ids: list[str]) -> None:
        self._running.difference_update(request_ids)
        self._core.send(wire.Abort(request_ids))

    def step(self) -> StepOutputs:
        while self._running:
            while self._outputs:
                outputs = self._outputs.popleft()
                self._running.difference_update(o.request_id for o in outputs.others if o.finish_reason is not None)
                if outputs:
                    return outputs
            self._take(self._core.wait())
        self._outputs.clear()
        return StepOutputs()

    def has_unfinished(self) -> bool:
        return bool(self._running)

    def reset_prefix_cache(self) -> bool:
        return bool(self._call("reset_prefix_cache"))

    def start_profile(self) -> None:
        self._call("start_profile")

    def stop_profile(self) -> str | None:
        path = self._call("stop_profile")
        return path if isinstance(path, str) else None

    def stats(self) -> dict[str, float]:
        """As of the last step."""
        self._take(self._core.receive())
        return self._stats

    @property
    def startup(self) -> dict[str, float]:
        return self._startup

    def describe(self) -> dict[str, Any]:
        return self._plan

    def close(self) -> None:
        self._core.close()

    def _call(self, method: str) -> bool | str | None:
        self._num_calls += 1
        self._core.send(wire.Call(self._num_calls, method))
        while True:
            for reply in self._take(self._core.wait()):
                if reply.call_id == self._num_calls:
                    if reply.error is not None:
                        raise RuntimeError(f"{method}: {reply.error}")
                    return reply.value

    def _take(self, messages: list[wire.FromCore]) -> list[wire.Reply]:
        """Keep outputs for `step`; the replies among the messages."""
        replies = []
        for message in messages:
            if isinstance(message, wire.Outputs):
                self._outputs.append(message.outputs)
                self._stats = message.stats
            elif isinstance(message, wire.Reply):
                replies.append(message)
        return replies


def make_client(config: Config) -> EngineClient:
    return ProcessClient(config) if config.asyncio_mode else InprocClient(config)
