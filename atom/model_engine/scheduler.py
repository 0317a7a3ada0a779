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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from atom.model_engine.block_manager import BlockManager
from atom.model_engine.protocol import (
    EngineOutput,
    EngineRequest,
    ModelOutput,
    NewRequest,
    ScheduledBatch,
    StepOutputs,
)
from atom.model_engine.sequence import Sequence, SequenceStatus
from atom.model_engine.sequence_group import SequenceGroup
from atom.model_engine.sequence_table import SequenceTable

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
    """A batch in the making, and then until `update` has seen its tokens.

    decodes: plain ones, one token each, handled all at once; scheduled: all others, after them in the batch, and
    their numbers of tokens. num_finished: the scheduler's when it was scheduled.
    """

    budget: int
    decodes: SequenceGroup
    scheduled: dict[Sequence, int] = field(default_factory=dict)
    new_requests: list[NewRequest] = field(default_factory=list)
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)
    has_preempted: bool = False
    has_prefill: bool = False
    started: float = 0.0
    num_finished: int = 0


class Scheduler:
    """Policy only: no tensors, no I/O. Every scheduled batch is given back to `update`, in order."""

    def __init__(
        self, limits: SchedulerLimits, block_manager: BlockManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.blocks = block_manager
        self.num_preemptions = 0
        self._clock = clock
        self._table = SequenceTable()
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap; finished ones are skipped
        self._num_waiting = 0
        self._running: list[Sequence] = []  # by sort_key
        self._running_group: SequenceGroup | None = None  # of them; None once they have changed
        self._num_finished = 0
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
        seq = Sequence(request, self._order, self.limits.max_model_len, self._table, grammar)
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
        decodes, others = self._split_running()
        step = _Step(self.limits.max_num_batched_tokens, decodes)
        if not self._add_decodes(step):  # one by one then, as some can't run
            step.decodes = SequenceGroup([])
            others = [seq for seq in self._running if seq.num_uncomputed_tokens == 1]
            others += [seq for seq in self._running if seq.num_uncomputed_tokens > 1]
        for seq in others:
            if step.budget == 0:
                break
            self._add_running(step, seq)
        # A step that had to preempt admits nobody: the newcomer would be the next victim.
        if step.has_preempted:
            step.decodes = step.decodes.take(step.decodes.indices_of_running())
        else:
            self._admit_waiting(step)
        removed += self._removed
        self._removed = []
        if not step.decodes.sequences and not step.scheduled:
            self._removed = removed
            return None
        return self._start(step, removed)

    def update(self, batch: ScheduledBatch, output: ModelOutput) -> StepOutputs:
        """Take in what the oldest scheduled step computed: append, finish, free."""
        step = self._in_flight.popleft()
        if step.has_prefill:
            self._last_prefill_seconds = self._clock() - step.started
        results = StepOutputs()
        decodes, others = step.decodes, list(step.scheduled)
        num_decodes = len(decodes.sequences)
        if output.request_ids[:num_decodes] == decodes.request_ids:
            tokens = output.token_ids[:num_decodes]
            if step.num_finished != self._num_finished:  # some ended or were aborted while the step ran
                alive = decodes.indices_of_unfinished()
                decodes, tokens = decodes.take(alive), [tokens[i] for i in alive]
            self._update_decodes(decodes, tokens, results)
        else:
            num_decodes, others = 0, decodes.sequences + others
        if others:
            token_of = dict(zip(output.request_ids[num_decodes:], output.token_ids[num_decodes:], strict=True))
            for seq in others:
                if seq.status is not SequenceStatus.FINISHED:
                    self._update_one(seq, token_of.get(seq.request_id), output, results)
        return results

    def check(self) -> None:
        """Assert the invariants between requests and blocks; cheap enough for when the engine is idle."""
        assert all(s.status is SequenceStatus.RUNNING for s in self._running)
        assert self._running == sorted(self._running, key=lambda s: s.sort_key)
        assert len(self._running) <= self.limits.max_num_seqs
        assert len(self._running) + self._num_waiting == len(self._sequences)
        self.blocks.check(self._running)

    def _split_running(self) -> tuple[SequenceGroup, list[Sequence]]:
        """Running sequences with tokens to compute: plain decodes, and others in the order they are served."""
        if self._running_group is None:
            self._running_group = SequenceGroup(self._running)
        group, table = self._running_group, self._table
        rows = group.rows
        num_tokens = table.num_tokens[rows]
        uncomputed = num_tokens - table.num_computed[rows]
        # Tokens on their way may be the last it can have.
        is_ready = (num_tokens < table.max_num_tokens[rows]) | (num_tokens == table.num_known[rows])
        is_decode = is_ready & (uncomputed == 1)
        is_plain = is_decode & (table.is_plain[rows] != 0)
        if is_plain.all():
            return group, []
        others = [*np.flatnonzero(is_decode & ~is_plain).tolist(), *np.flatnonzero(is_ready & ~is_decode).tolist()]
        return group.take(np.flatnonzero(is_plain).tolist()), [group.sequences[i] for i in others]

    def _add_decodes(self, step: _Step) -> bool:
        """All of step.decodes, with a block for each that needs one. False, and no change, if they can't all run."""
        sequences, rows = step.decodes.sequences, step.decodes.rows
        ends = self._table.num_computed[rows] + 1
        growing = np.flatnonzero(ends > self._table.capacity[rows])
        if len(sequences) > step.budget or len(growing) > self.blocks.num_free_blocks:
            return False
        for i in growing.tolist():
            step.new_block_ids[sequences[i].request_id] = self.blocks.add_block(sequences[i])
        self._table.capacity[rows[growing]] += self.blocks.block_size
        step.budget -= len(sequences)
        return True

    def _add_running(self, step: _Step, seq: Sequence) -> None:
        """As many of its tokens as the budget allows; preempts those served last until there are blocks for them."""
        if seq.status is not SequenceStatus.RUNNING:
            return  # preempted for the sake of an earlier one
        # Tokens on their way may be the last it can have, or tell what may follow.
        if seq.num_pending_tokens and (seq.num_tokens >= seq.max_num_tokens or seq.grammar is not None):
            return
        count = min(seq.num_uncomputed_tokens, step.budget)
        end = seq.num_computed_tokens + count
        if end > seq.capacity:
            new_blocks = self.blocks.grow(seq, end)
            while new_blocks is None:
                victim = self._running[-1]
                self._preempt(victim)
                step.has_preempted = True
                step.budget += step.scheduled.pop(victim, 0)
                step.new_block_ids.pop(victim.request_id, None)
                if victim is seq:
                    return
                new_blocks = self.blocks.grow(seq, end)
            step.new_block_ids[seq.request_id] = new_blocks
        step.scheduled[seq] = count
        step.budget -= count
        step.has_prefill = step.has_prefill or count > 1

    def _admit_waiting(self, step: _Step) -> None:
        while step.budget > 0 and self._num_waiting and len(self._running) < self.limits.max_num_seqs:
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
            count = min(seq.num_uncomputed_tokens, step.budget)
            grown = self.blocks.grow(seq, seq.num_computed_tokens + count)
            assert grown is not None
            self._insert_running(seq)
            step.new_requests.append(
                NewRequest(
                    request_id=seq.request_id,
                    token_ids=seq.token_ids[:],
                    num_prompt_tokens=seq.num_prompt_tokens,
                    sampling_params=seq.params,
                    block_ids=seq.block_ids[:],
                    num_computed_tokens=seq.num_computed_tokens,
                )
            )
            step.scheduled[seq] = count
            step.budget -= count
            step.has_prefill = True

    def _start(self, step: _Step, removed: list[str]) -> ScheduledBatch:
        """Count the step's tokens as computed, and one more for each request that samples as pending."""
        rows = step.decodes.rows
        self._table.num_computed[rows] += 1
        self._table.num_tokens[rows] += 1
        num_scheduled_tokens = dict.fromkeys(step.decodes.request_ids, 1)
        token_masks = {}
        for seq, count in step.scheduled.items():
            num_scheduled_tokens[seq.request_id] = count
            seq.num_computed_tokens += count
            if seq.num_computed_tokens == seq.num_tokens:
                seq.num_tokens += 1
            if seq.grammar is not None and seq.num_pending_tokens:
                token_masks[seq.request_id] = seq.grammar.mask(seq.params.ignore_eos)
        step.started, step.num_finished = self._clock(), self._num_finished
        self._in_flight.append(step)
        return ScheduledBatch(
            new_requests=step.new_requests,
            new_block_ids=step.new_block_ids,
            num_scheduled_tokens=num_scheduled_tokens,
            removed_request_ids=removed,
            total_tokens=len(step.decodes.sequences) + sum(step.scheduled.values()),
            token_masks=token_masks,
        )

    def _update_decodes(self, group: SequenceGroup, tokens: list[int], results: StepOutputs) -> None:
        """A token for each; only those that may end with it, or have filled a block, are looked at one by one."""
        if not group.sequences:
            return
        for token_ids, token in zip(group.token_lists, tokens, strict=True):
            token_ids.append(token)
        rows, table = group.rows, self._table
        known = table.num_known[rows] + 1
        table.num_known[rows] = known
        for i in np.flatnonzero(table.num_computed[rows] >= table.registers_at[rows]).tolist():
            self.blocks.register_computed(group.sequences[i])
        at_end = np.flatnonzero(known >= table.max_num_tokens[rows]).tolist()
        stops = group.stop_token_ids
        if not stops.isdisjoint(tokens):
            at_end = sorted({*at_end, *(i for i, token in enumerate(tokens) if token in stops)})
        results.request_ids, results.token_ids = group.request_ids, tokens
        endings = [(i, ending) for i in at_end if (ending := group.sequences[i].ending(tokens[i])) is not None]
        if not endings:
            return
        results.request_ids = group.request_ids[:]
        for i, ending in reversed(endings):  # from the back, so that the places in front stay
            result = EngineOutput(request_id=results.request_ids.pop(i), new_token_ids=[tokens.pop(i)])
            self._end(group.sequences[i], result, *ending)
            results.others.append(result)

    def _update_one(self, seq: Sequence, token: int | None, output: ModelOutput, results: StepOutputs) -> None:
        request_id = seq.request_id
        if (error := output.errors.get(request_id)) is not None:
            self._finish(seq)
            results.others.append(
                EngineOutput(request_id=request_id, new_token_ids=[], finish_reason="error", error=error)
            )
            return
        if token is not None:
            results.others.append(self._take_token(seq, token, output))
        if seq.status is SequenceStatus.RUNNING and seq.num_computed_tokens >= seq.registers_at:
            self.blocks.register_computed(seq)

    def _take_token(self, seq: Sequence, token: int, output: ModelOutput) -> EngineOutput:
        seq.append(token)
        is_last = seq.grammar is not None and seq.grammar.takes_last(token)
        if seq.grammar is not None and seq.grammar.error is not None:
            self._finish(seq)
            return seq.grammar.failure(seq.request_id)
        result = EngineOutput(request_id=seq.request_id, new_token_ids=[token], num_cached_tokens=seq.num_cached_tokens)
        if is_last:
            self._end(seq, result, "stop", token if token in seq.stop_token_ids else None)
        elif (ending := seq.ending(token)) is not None:
            self._end(seq, result, *ending)
        else:
            seq.is_plain = seq.grammar is None and seq.params.logprobs is None
        if (logprobs := output.logprobs.get(seq.request_id)) is not None:
            result.new_logprobs = logprobs
        result.prompt_logprobs = output.prompt_logprobs.get(seq.request_id)
        return result

    def _end(self, seq: Sequence, result: EngineOutput, reason: str, stop_token: int | None) -> None:
        result.finish_reason, result.stop_reason = reason, stop_token
        self.blocks.register_computed(seq)
        self._finish(seq)

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
        self._remove_running(seq)
        self.blocks.free(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        self.num_preemptions += 1
        self._removed.append(seq.request_id)
        self._push_waiting(seq)

    def _finish(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._remove_running(seq)
            self._removed.append(seq.request_id)
            self.blocks.free(seq)
        else:
            self._num_waiting -= 1  # its heap entry is skipped when it comes up
        seq.status = SequenceStatus.FINISHED
        self._num_finished += 1
        self._table.give_back(seq.row)
        del self._sequences[seq.request_id]
        del self._waiting_since[seq.request_id]

    def _insert_running(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        bisect.insort(self._running, seq, key=lambda s: s.sort_key)
        self._running_group = None

    def _remove_running(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._running_group = None

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
