"""What all endpoints share: the engine, the settings, and the way in: model name, queue, time limit."""

import asyncio
import uuid
from typing import Any

from fastapi import Request

from atom.entrypoints.openai.errors import ApiError
from atom.entrypoints.openai.metrics import Metrics
from atom.entrypoints.openai.settings import ServerSettings
from atom.entrypoints.openai.streaming import OpenStreams
from atom.model_engine.async_llm_engine import AsyncLLMEngine, EngineDeadError, RequestStream, Signal
from atom.model_engine.input_processor import Prompt
from atom.model_engine.output_processor import OutputKind
from atom.sampling_params import SamplingParams
from atom.utils.errors import RequestError


class ServingContext:
    def __init__(self, engine: AsyncLLMEngine, settings: ServerSettings, metrics: Metrics) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self.streams = OpenStreams()

    @property
    def model_name(self) -> str:
        return self.settings.served_model_names[0]

    def check_model(self, name: str | None) -> str:
        """The name to answer with; 404 for a model that isn't served."""
        if name is None:
            return self.model_name
        if name not in self.settings.served_model_names:
            served = ", ".join(self.settings.served_model_names)
            raise ApiError(
                404, f"the model {name!r:.200} does not exist; served: {served}", param="model", code="model_not_found"
            )
        return name

    def check_queue(self) -> None:
        """429 when too many requests wait already, 503 when there is no engine to wait for."""
        self.require_engine()
        engine = self.engine
        waiting = engine.num_waiting
        if waiting >= self.settings.max_queue and engine.num_unfinished >= engine.config.max_num_seqs:
            raise ApiError(
                429,
                f"{waiting} requests are waiting already, and max_queue={self.settings.max_queue} may",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def require_engine(self) -> None:
        """503 while there is no engine core."""
        if not self.engine.is_healthy:
            reason = self.engine.death or "it is shut down"
            headers = {"Retry-After": "5"}
            raise ApiError(503, f"the engine is not available: {reason}", code="engine_dead", headers=headers)

    def current_stats(self) -> dict[str, float]:
        """The engine's after its last step, with what only this process knows."""
        engine = self.engine
        stats = {"up": float(engine.is_healthy), "restarts": engine.num_restarts}
        return engine.stats() | {"waiting": max(0, engine.num_waiting)} | stats

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        kind: OutputKind,
        priority: int | None = None,
        cache_salt: str | None = None,
        signal: Signal | None = None,
    ) -> RequestStream:
        """Queue a request under the server's limits; close the stream. ApiError, RequestError."""
        self.check_queue()
        try:
            stream = await self.engine.submit(
                prompt,
                params,
                request_id,
                priority=priority or 0,
                cache_salt=cache_salt or "",
                output_kind=kind,
                signal=signal,
            )
        except EngineDeadError as error:  # between the check and now
            raise ApiError(503, f"the engine is not available: {error}", code="engine_dead") from None
        limit = self.settings.request_timeout
        if limit is not None:
            too_late = ApiError(504, f"the request took longer than {limit:g} s", code="timeout", type="timeout_error")
            loop = asyncio.get_running_loop()
            timer = loop.call_later(limit, self.engine.drop, request_id, too_late)
            stream.on_end = timer.cancel
        return stream


def answer_id(prefix: str, http: Request | None) -> str:
    """Unique, and recognizable where the client sent an id of its own."""
    given = getattr(http.state, "request_id", "") if http is not None else ""
    return f"{prefix}-{given}-{uuid.uuid4().hex[:8]}" if given else f"{prefix}-{uuid.uuid4().hex}"


def check_priority(priority: int | None) -> None:
    if priority is not None and not -(2**31) <= priority < 2**31:
        raise RequestError(f"priority={priority} must be between -2147483648 and 2147483647", "priority")


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
