"""Which tokens run in the next step.

The scheduler counts tokens, not phases: a step gives each request some of its not yet computed
tokens within `max_num_batched_tokens`. Decodes go first, so that a long prompt never starves them;
chunks of prompts fill what is left. When blocks run out, the request served last is preempted: its
blocks are freed and it is computed again later (recompute).

Steps may overlap: `schedule` may be called again before `update` has seen the last step's tokens. It then
counts on one more token for each request that samples, and plans no further than a request can go. What
only the tokens tell (a stop token) takes effect one step late, and the surplus token is dropped. A request
with a grammar does not run ahead: its last token tells what the next may be. Steps must execute in the order
they were scheduled.
"""

import bisect
import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atom.model_engine.block_manager import BlockManager
from atom.model_engine.protocol import (
    EngineOutput,
    EngineRequest,
    ModelOutput,
    NewRequest,
    ScheduledBatch,
)
from atom.model_engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from atom.model_engine.structured_output import Grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """delay_factor: see `Scheduler._may_admit`; lengths and budgets in tokens."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    delay_factor: float = 0.0


@dataclass(slots=True)
class _Step:
    """A scheduled batch that `update` has not seen yet; the sequences, as ids may be used anew."""

    sequences: list[Sequence]
    started: float
    has_prefill: bool


class Scheduler:
    """Policy only: no tensors, no I/O. Every scheduled batch is given back to `update`, in order."""

    def __init__(
        self, limits: SchedulerLimits, block_manager: BlockManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.blocks = block_manager
        self.num_preemptions = 0
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap; finished ones are skipped
        self._num_waiting = 0
        self._running: list[Sequence] = []  # by sort_key
        self._removed: list[str] = []  # for the workers to forget at the next step
        self._order = 0
        self._waiting_since: dict[str, float] = {}
        self._last_prefill_seconds = 0.0
        self._in_flight: deque[_Step] = deque()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def add(self, request: EngineRequest, grammar: "Grammar | None" = None) -> None:
        """grammar: must be ready."""
        assert request.request_id not in self._sequences, f"request id {request.request_id!r} is in use"
        seq = Sequence(request, self._order, self.limits.max_model_len, grammar)
        self._order += 1
        self._sequences[seq.request_id] = seq
        self._waiting_since[seq.request_id] = self._clock()
        self._push_waiting(seq)

    def abort(self, request_id: str) -> bool:
        """Drop a request at any stage; its blocks are free before the next step. False if unknown."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._finish(seq)
        return True

    def drop_running(self) -> list[str]:
        """Forget steps under way and the requests that depend on them; the workers are to forget all requests."""
        lost = [s for s in self._sequences.values() if s.status is SequenceStatus.RUNNING or s.num_pending_tokens]
        for seq in lost:
            self._finish(seq)
        self._in_flight.clear()
        self._removed.clear()
        return [seq.request_id for seq in lost]

    def schedule(self) -> ScheduledBatch | None:
        """The next step's work, or None when nothing can or need run."""
        removed, self._removed = self._removed, []
        budget = self.limits.max_num_batched_tokens
        scheduled: dict[str, int] = {}
        sequences: dict[str, Sequence] = {}
        new: list[NewRequest] = []
        new_block_ids: dict[str, list[int]] = {}
        preempted = False
        has_prefill = False

        # Decodes before chunks of prompts, each in order of service.
        decoding: list[tuple[Sequence, int]] = []
        prefilling: list[tuple[Sequence, int]] = []
        for seq in self._running:
            pending = seq.num_pending_tokens
            num_tokens = len(seq.token_ids) + pending
            # Tokens on their way may be the last it can have, or tell what may follow.
            if pending and (num_tokens >= seq.max_num_tokens or seq.grammar is not None):
                continue
            uncomputed = num_tokens - seq.num_computed_tokens
            (decoding if uncomputed == 1 else prefilling).append((seq, uncomputed))
        block_size = self.blocks.block_size
        running = SequenceStatus.RUNNING
        for seq, uncomputed in decoding + prefilling:
            if budget == 0:
                break
            if preempted and seq.status is not running:
                continue  # preempted below for the sake of an earlier one
            count = uncomputed if uncomputed < budget else budget
            end = seq.num_computed_tokens + count
            if end > len(seq.block_ids) * block_size:
                new_blocks = self.blocks.grow(seq, end)
                while new_blocks is None:
                    victim = self._running[-1]
                    self._preempt(victim)
                    preempted = True
                    if sequences.pop(victim.request_id, None) is not None:
                        budget += scheduled.pop(victim.request_id)
                        new_block_ids.pop(victim.request_id, None)
                    if victim is seq:
                        break
                    new_blocks = self.blocks.grow(seq, end)
                if new_blocks is None:
                    continue
                new_block_ids[seq.request_id] = new_blocks
            scheduled[seq.request_id] = count
            sequences[seq.request_id] = seq
            budget -= count
            has_prefill = has_prefill or count > 1

        # A step that had to preempt admits nobody: the newcomer would be the next victim.
        while budget > 0 and not preempted and self._num_waiting and len(self._running) < self.limits.max_num_seqs:
            seq = self._peek_waiting()
            if not self._may_admit(seq):
                break
            hit = self.blocks.match_prefix(seq) if seq.params.prompt_logprobs is None else []
            # Room for the whole known sequence, or it would be preempted half-way through its prompt.
            if not self.blocks.can_hold(seq.num_tokens, hit):
                break
            self._pop_waiting()
            self.blocks.start(seq, hit)
            seq.num_computed_tokens = len(hit) * self.blocks.block_size
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = seq.num_computed_tokens
            count = min(seq.num_uncomputed_tokens, budget)
            grown = self.blocks.grow(seq, seq.num_computed_tokens + count)
            assert grown is not None
            self._insert_running(seq)
            new.append(
                NewRequest(
                    request_id=seq.request_id,
                    token_ids=seq.token_ids[:],
                    num_prompt_tokens=seq.num_prompt_tokens,
                    sampling_params=seq.params,
                    block_ids=seq.block_ids[:],
                    num_computed_tokens=seq.num_computed_tokens,
                )
            )
            scheduled[seq.request_id] = count
            sequences[seq.request_id] = seq
            budget -= count
            has_prefill = True

        removed += self._removed
        self._removed = []
        if not scheduled:
            self._removed = removed
            return None
        step = list(sequences.values())
        for seq, count in zip(step, scheduled.values(), strict=True):
            seq.num_computed_tokens = computed = seq.num_computed_tokens + count
            if computed == len(seq.token_ids) + seq.num_pending_tokens:
                seq.num_pending_tokens += 1
        self._in_flight.append(_Step(step, self._clock(), has_prefill))
        return ScheduledBatch(
            new_requests=new,
            new_block_ids=new_block_ids,
            num_scheduled_tokens=scheduled,
            removed_request_ids=removed,
            total_tokens=self.limits.max_num_batched_tokens - budget,
            token_masks={
                seq.request_id: seq.grammar.mask(seq.params.ignore_eos)
                for seq in step
                if seq.grammar is not None and seq.num_pending_tokens
            },
        )

    def update(self, batch: ScheduledBatch, output: ModelOutput) -> list[EngineOutput]:
        """Take in what the oldest scheduled step computed: append, finish, free."""
        step = self._in_flight.popleft()
        if step.has_prefill:
            self._last_prefill_seconds = self._clock() - step.started
        results: list[EngineOutput] = []
        block_size = self.blocks.block_size
        sampled_token_ids, errors = output.sampled_token_ids, output.errors
        running, finished = SequenceStatus.RUNNING, SequenceStatus.FINISHED
        for seq in step.sequences:
            if seq.status is finished:
                continue  # ended or aborted while the step ran
            request_id = seq.request_id
            if errors and (error := errors.get(request_id)) is not None:
                results.append(
                    EngineOutput(request_id=request_id, new_token_ids=[], finish_reason="error", error=error)
                )
                self._finish(seq)
                continue
            sampled = sampled_token_ids.get(request_id)
            if sampled:
                seq.num_pending_tokens -= 1
                results.append(self._take_tokens(seq, sampled, output))
            full = seq.num_computed_tokens >= (seq.num_registered_blocks + 1) * block_size
            if full and seq.status is running:
                self.blocks.register_computed(seq)
        return results

    def check(self) -> None:
        """Assert the invariants between requests and blocks; cheap enough for when the engine is idle."""
        assert all(s.status is SequenceStatus.RUNNING for s in self._running)
        assert self._running == sorted(self._running, key=lambda s: s.sort_key)
        assert len(self._running) <= self.limits.max_num_seqs
        assert len(self._running) + self._num_waiting == len(self._sequences)
        self.blocks.check(self._running)

    def _take_tokens(self, seq: Sequence, sampled: list[int], output: ModelOutput) -> EngineOutput:
        taken, reason, stop_reason = self._append(seq, sampled)
        if seq.grammar is not None and seq.grammar.error is not None:
            self._finish(seq)
            return seq.grammar.failure(seq.request_id)
        if reason is not None:
            self.blocks.register_computed(seq)
            self._finish(seq)
        result = EngineOutput(
            request_id=seq.request_id,
            new_token_ids=taken,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=seq.num_cached_tokens,
        )
        if output.logprobs and (logprobs := output.logprobs.get(seq.request_id)) is not None:
            result.new_logprobs = logprobs[: len(taken)]
        if output.prompt_logprobs:
            result.prompt_logprobs = output.prompt_logprobs.get(seq.request_id)
        return result

    def _append(self, seq: Sequence, sampled: list[int]) -> tuple[list[int], str | None, int | None]:
        """Append tokens up to the one that ends the request: (taken, finish reason, stop token)."""
        for i, token in enumerate(sampled, start=1):
            seq.token_ids.append(token)
            num_known = len(seq.token_ids)
            if seq.grammar is not None and seq.grammar.takes_last(token):
                return sampled[:i], "stop", token if token in seq.stop_token_ids else None
            if token in seq.stop_token_ids and num_known >= seq.min_num_tokens:
                return sampled[:i], "stop", token
            if num_known >= seq.max_num_tokens:
                return sampled[:i], "length", None
        return sampled, None, None

    def _may_admit(self, seq: Sequence) -> bool:
        """With a delay factor f, a prompt waits while others run until f x the last prefill's duration is over.

        A preempted request waits until its pending tokens are known: they are part of what is recomputed.
        """
        if seq.num_pending_tokens:
            return False
        if self.limits.delay_factor <= 0 or not self._running:
            return True
        waited = self._clock() - self._waiting_since[seq.request_id]
        return waited > self.limits.delay_factor * self._last_prefill_seconds

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self.blocks.free(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        self.num_preemptions += 1
        self._removed.append(seq.request_id)
        self._push_waiting(seq)

    def _finish(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._running.remove(seq)
            self._removed.append(seq.request_id)
            self.blocks.free(seq)
        else:
            self._num_waiting -= 1  # its heap entry is skipped when it comes up
        seq.status = SequenceStatus.FINISHED
        del self._sequences[seq.request_id]
        del self._waiting_since[seq.request_id]

    def _insert_running(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        bisect.insort(self._running, seq, key=lambda s: s.sort_key)

    def _push_waiting(self, seq: Sequence) -> None:
        heapq.heappush(self._waiting, (seq.sort_key, seq))
        self._num_waiting += 1

    def _peek_waiting(self) -> Sequence:
        while self._waiting[0][1].status is not SequenceStatus.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1]

    def _pop_waiting(self) -> None:
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
