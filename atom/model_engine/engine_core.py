"""The loop at the heart: schedule, execute, update. Runs in the caller's process or in its own."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from atom.config import Config
from atom.model_engine.block_manager import BlockManager
from atom.model_engine.executor import make_executor
from atom.model_engine.protocol import EngineOutput, EngineRequest, ModelOutput, ScheduledBatch, StepOutputs
from atom.model_engine.scheduler import Scheduler, SchedulerLimits
from atom.model_engine.structured_output import Grammar, GrammarCompiler
from atom.model_loader.tokenizer import load_tokenizer
from atom.utils import startup
from atom.utils.logging import get_logger

logger = get_logger(__name__)


class EngineCore:
    """Owns the scheduler and the workers; speaks only the structs of `protocol`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        inactive = config.inactive_settings()
        if inactive:
            logger.warning("not yet active: %s (see docs/status.md)", ", ".join(inactive))
        with startup.measured() as self._timer:
            with startup.phase("import atom"):
                self.executor = make_executor(config)
            self.plan = self.executor.initialize()
        assert config.max_model_len is not None
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                delay_factor=config.scheduler_delay_factor,
            ),
            BlockManager(self.plan.num_blocks, config.kv_cache_block_size, config.enable_prefix_caching),
        )
        self._in_flight: deque[tuple[ScheduledBatch, Callable[[], ModelOutput]]] = deque()
        self._grammars = GrammarCompiler(
            lambda: load_tokenizer(config), config.hf_config.vocab_size, config.end_token_ids
        )
        self._unprepared: dict[str, tuple[EngineRequest, Grammar]] = {}  # their grammars are being made
        self._seconds_to_token = 0.0
        self.step = self._step_to_first_token  # type: ignore[method-assign]  # until then; no later step is timed

    def add_request(self, request: EngineRequest) -> None:
        if request.grammar:
            self._unprepared[request.request_id] = (request, self._grammars.start(request.grammar))
        else:
            self.scheduler.add(request)

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if self._unprepared.pop(request_id, None) is None:
                self.scheduler.abort(request_id)

    def has_unfinished(self) -> bool:
        return bool(self._unprepared) or self.scheduler.has_unfinished()

    def step(self) -> StepOutputs:
        """The outputs of the oldest step under way, after starting as many as may overlap with it."""
        failed = self._admit_prepared()
        while len(self._in_flight) < self.executor.max_in_flight:
            batch = self.scheduler.schedule()
            if batch is None:
                break
            self._in_flight.append((batch, self.executor.submit(batch)))
        if not self._in_flight:
            return StepOutputs(others=failed)
        batch, result = self._in_flight.popleft()
        outputs = self.scheduler.update(batch, result())
        outputs.others[:0] = failed
        return outputs

    def _step_to_first_token(self) -> StepOutputs:
        started = time.perf_counter()
        outputs = EngineCore.step(self)
        self._seconds_to_token += time.perf_counter() - started
        if any(output.new_token_ids for output in outputs):
            del self.step
            self._timer.add_first_token(self._seconds_to_token)
            logger.debug(
                "first token in %.3f s; %.2f s with the start", self._seconds_to_token, self.startup[startup.TOTAL]
            )
        return outputs

    def _admit_prepared(self) -> list[EngineOutput]:
        """Hand requests whose grammar is there to the scheduler; those whose grammar failed are returned."""
        failed = []
        for request_id, (request, grammar) in list(self._unprepared.items()):
            if not grammar.is_ready:
                continue
            del self._unprepared[request_id]
            if grammar.check():
                self.scheduler.add(request, grammar)
            else:
                failed.append(grammar.failure(request_id))
        return failed

    def is_stepping(self) -> bool:
        """Whether anything is admitted or under way; False while all that there is waits."""
        return bool(self._in_flight or self.scheduler.num_running)

    def recover(self, error: str) -> StepOutputs:
        """After `step` raised: drop what ran, which gets `error`, and keep what waits."""
        self._in_flight.clear()
        failed = self.scheduler.drop_running()
        self.executor.forget_requests()
        return StepOutputs(
            others=[EngineOutput(request_id=i, new_token_ids=[], finish_reason="error", error=error) for i in failed]
        )

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.blocks.reset_prefix_cache()

    def start_profile(self) -> None:
        self.executor.start_profile()

    def stop_profile(self) -> str | None:
        return self.executor.stop_profile()

    def stats(self) -> dict[str, float]:
        blocks = self.scheduler.blocks
        return {
            "running": self.scheduler.num_running,
            "waiting": self.scheduler.num_waiting + len(self._unprepared),
            "kv_cache_usage": 1 - blocks.num_free_blocks / blocks.num_blocks,
            "prefix_hit_rate": blocks.num_hit_tokens / max(1, blocks.num_queried_tokens),
            "preemptions": self.scheduler.num_preemptions,
            "blocks_in_use": blocks.num_blocks - blocks.num_free_blocks,
            "prefix_queries": blocks.num_queried_tokens,
            "prefix_hits": blocks.num_hit_tokens,
        }

    @property
    def startup(self) -> dict[str, float]:
        """Seconds by phase of the start, up to the first token if there has been one; "total" is their sum."""
        return self._timer.seconds()

    def describe(self) -> dict[str, Any]:
        """The memory plan: blocks, bytes, and why."""
        plan = self.plan
        return {**asdict(plan), "cache_bytes": plan.cache_bytes, "num_cached_tokens": plan.num_cached_tokens}

    def close(self) -> None:
        self._grammars.close()
        self.executor.close()
