"""What the sampler must know about each request, kept in rows between steps.

A step only changes what differs: parameters are collected again when the rows do. Steps of the same rows
only count themselves, and take the next of the random numbers made for several steps at once.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from atom.layers.sampler import SamplerOutput, SamplingMetadata
from atom.model_engine.protocol import TokenLogprobs
from atom.sampling_params import SamplingParams
from atom.utils.rng import seed_key, uniform_of_key

_PLAIN_GREEDY = SamplingMetadata(all_greedy=True)
_STEPS_AHEAD = 16  # for which random numbers are made at once


class SamplingState:
    """Rows are stable slots: add, then any number of build and append, then remove."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._live = np.zeros(max_rows, dtype=bool)
        self._temperature = np.zeros(max_rows, dtype=np.float32)
        self._top_k = np.full(max_rows, vocab_size, dtype=np.int32)
        self._top_p = np.ones(max_rows, dtype=np.float32)
        self._min_p = np.zeros(max_rows, dtype=np.float32)
        self._key = np.zeros(max_rows, dtype=np.uint64)
        self._num_output = np.zeros(max_rows, dtype=np.int64)  # less what _built has counted
        self._num_logprobs = np.full(max_rows, -1, dtype=np.int64)
        self._min_tokens = np.zeros(max_rows, dtype=np.int64)  # 0 once they are reached
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # row -> (token ids, values)
        self._suppressed: dict[int, np.ndarray] = {}  # row -> stop ids, while below min_tokens
        self._penalties = _PenaltyPool(max_rows, vocab_size, device)
        self._special = np.zeros(max_rows, dtype=bool)  # anything but plain greedy
        self._num_special = 0
        self._built: _Built | None = None

    def add(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        stop_token_ids: Sequence[int],
    ) -> None:
        """Fill a free row. The output is not empty when a preempted request resumes.

        params.seed is resolved; stop_token_ids are those that may not come before params.min_tokens.
        """
        assert not self._live[row], f"row {row} is in use"
        self._settle()
        self._live[row] = True
        greedy = params.temperature == 0
        self._temperature[row] = params.temperature
        if not greedy:
            assert params.seed is not None, "the engine resolves params.seed"
            self._key[row] = seed_key(params.seed)
            # No filter removes the most likely token, so greedy rows have none.
            if 0 < params.top_k < self.vocab_size:
                self._top_k[row] = params.top_k
            self._top_p[row] = params.top_p
            self._min_p[row] = params.min_p
        self._num_output[row] = len(output_token_ids)
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        if params.logit_bias:
            self._bias[row] = (
                np.fromiter(params.logit_bias.keys(), dtype=np.int64, count=len(params.logit_bias)),
                np.fromiter(params.logit_bias.values(), dtype=np.float32, count=len(params.logit_bias)),
            )
        if len(output_token_ids) < params.min_tokens:
            stops = np.unique(np.asarray(stop_token_ids, dtype=np.int64))
            stops = stops[(stops >= 0) & (stops < self.vocab_size)]  # models without one have -1
            if len(stops):
                self._suppressed[row] = stops
                self._min_tokens[row] = params.min_tokens
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._penalties.add(row, params, prompt_token_ids, output_token_ids)
        self._classify(row)

    def remove(self, row: int) -> None:
        """Free a row."""
        assert self._live[row], f"row {row} is not in use"
        self._settle()
        self._live[row] = False
        self._temperature[row] = 0
        self._top_k[row] = self.vocab_size
        self._top_p[row] = 1
        self._min_p[row] = 0
        self._num_logprobs[row] = -1
        self._min_tokens[row] = 0
        self._bias.pop(row, None)
        self._suppressed.pop(row, None)
        self._penalties.remove(row)
        self._classify(row)

    def append(self, rows: Sequence[int] | np.ndarray, token_ids: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """A step gave each of these (distinct) rows one token. A tensor on the device is not waited for."""
        if not self._num_special:
            return  # plain greedy rows count nothing, and never become anything else
        built = self._built
        if built is not None and built.is_of(rows):
            built.num_appended += 1
            if built.places is not None:
                built.places.add_tokens(token_ids)
            if built.num_appended < built.lifts_at:
                return
            self._settle()
        else:
            self._settle()
            rows = np.asarray(rows, dtype=np.int64)
            self._num_output[rows] += 1
            places = self._penalties.find(rows)
            if places is not None:
                places.add_tokens(token_ids)
        self._lift_reached()

    def build(self, rows: Sequence[int] | np.ndarray) -> SamplingMetadata:
        """The metadata for a step in which these (distinct) rows sample, in this order.

        Valid until the next call: the object may be used again with other tensors. An array must not change later.
        """
        if not self._num_special:
            return _PLAIN_GREEDY
        built = self._built
        if built is None or not built.is_of(rows):
            self._settle()
            built = self._built = self._collect(np.asarray(rows, dtype=np.int64))
        self._refresh(built)
        return built.metadata

    def _settle(self) -> None:
        """Forget what was built, after taking over what it has counted."""
        if self._built is not None:
            self._num_output[self._built.rows] += self._built.num_appended
            self._built = None

    def _lift_reached(self) -> None:
        """Stop tokens may come in rows that have reached min_tokens; `_num_output` is settled."""
        for row in [r for r in self._suppressed if self._num_output[r] >= self._min_tokens[r]]:
            del self._suppressed[row]
            self._min_tokens[row] = 0
            self._classify(row)

    def _classify(self, row: int) -> None:
        special = bool(
            self._live[row]
            and (
                self._temperature[row] != 0
                or self._num_logprobs[row] >= 0
                or row in self._bias
                or row in self._suppressed
                or row in self._penalties
            )
        )
        self._num_special += int(special) - int(self._special[row])
        self._special[row] = special

    def _collect(self, rows: np.ndarray) -> "_Built":
        """All that stays the same while the rows do."""
        if not self._special[rows].any():
            return _Built(rows, _PLAIN_GREEDY)
        temperature = self._temperature[rows]
        metadata = SamplingMetadata(all_greedy=not temperature.any())
        built = _Built(rows, metadata)
        if not metadata.all_greedy:
            top_k, top_p, min_p = self._top_k[rows], self._top_p[rows], self._min_p[rows]
            metadata.temperature = self._to_device(temperature)
            metadata.top_k = self._to_device(top_k) if (top_k < self.vocab_size).any() else None
            metadata.top_p = self._to_device(top_p) if (top_p < 1).any() else None
            metadata.min_p = self._to_device(min_p) if min_p.any() else None
        logprobs = self._num_logprobs[rows]
        metadata.num_logprobs = int(logprobs.max())
        if metadata.num_logprobs >= 0 and logprobs.min() < 0:
            metadata.logprob_rows = self._to_device(np.flatnonzero(logprobs >= 0))
        self._collect_bias(rows, metadata)
        built.places = self._penalties.find(rows)
        if built.places is not None:
            self._penalties.collect(rows, built.places, metadata)
        suppressed = rows[self._min_tokens[rows] > 0]
        if len(suppressed):
            built.lifts_at = int((self._min_tokens[suppressed] - self._num_output[suppressed]).min())
        return built

    def _collect_bias(self, rows: np.ndarray, metadata: SamplingMetadata) -> None:
        if not self._bias and not self._suppressed:
            return
        at, tokens, values = [], [], []
        for i, row in enumerate(rows.tolist()):
            if row in self._bias:
                ids, bias = self._bias[row]
                at.append(np.full(len(ids), i))
                tokens.append(ids)
                values.append(bias)
            if row in self._suppressed:
                ids = self._suppressed[row]
                at.append(np.full(len(ids), i))
                tokens.append(ids)
                values.append(np.full(len(ids), -np.inf, dtype=np.float32))
        if at:
            metadata.bias_rows = self._to_device(np.concatenate(at))
            metadata.bias_tokens = self._to_device(np.concatenate(tokens))
            metadata.bias_values = self._to_device(np.concatenate(values))

    def _refresh(self, built: "_Built") -> None:
        """What is new in every step. Tensors are replaced: a step in flight may still read the old ones."""
        metadata, places = built.metadata, built.places
        if not metadata.all_greedy:
            ahead = built.num_appended - built.uniform_from
            if ahead == len(built.uniform):
                self._make_uniform(built)
                ahead = 0
            metadata.uniform = built.uniform[ahead]
        if places is not None and isinstance(places.at, torch.Tensor):
            metadata.output_counts = places.output_counts[places.at]

    def _make_uniform(self, built: "_Built") -> None:
        """Random numbers of the rows' next tokens, for several steps."""
        rows = built.rows
        positions = self._num_output[rows] + built.num_appended
        padded = np.zeros((_STEPS_AHEAD, -(-len(rows) // 4) * 4), dtype=np.float32)  # so that each row is aligned
        padded[:, : len(rows)] = uniform_of_key(self._key[rows], positions + np.arange(_STEPS_AHEAD)[:, None])
        built.uniform = self._to_device(padded)[:, : len(rows)].unbind()
        built.uniform_from = built.num_appended

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class _Built:
    """The last metadata and what is needed to bring it up to date, of steps in which the same rows sample.

    num_appended: tokens that each row got since; lifts_at: with how many the first has reached its min_tokens.
    uniform: float32 [R] of each of some steps on the device, the first with num_appended = uniform_from.
    """

    __slots__ = ("lifts_at", "metadata", "num_appended", "places", "rows", "uniform", "uniform_from")

    def __init__(self, rows: np.ndarray, metadata: SamplingMetadata) -> None:
        self.rows = rows
        self.metadata = metadata
        self.num_appended = 0
        self.lifts_at = sys.maxsize
        self.uniform: tuple[torch.Tensor, ...] = ()
        self.uniform_from = 0
        self.places: _Places | None = None

    def is_of(self, rows: Sequence[int] | np.ndarray) -> bool:
        if rows is not self.rows:  # it mostly is the last step's array
            if not np.array_equal(rows, self.rows):
                return False
            self.rows = np.asarray(rows, dtype=np.int64)
        return True


class _Places(NamedTuple):
    """Of some rows, those P with penalties, and where the pool holds them; good until its slots change.

    where: int64 [P], which of the rows; at: their slots, a slice if they are adjacent; output_counts: the pool's;
    flat_counts: the same, flat; firsts: int64 [P], where in it theirs begin; chosen: `where` on the device, None for
    all of the rows; ones: int32 [P].
    """

    where: np.ndarray
    at: slice | torch.Tensor
    output_counts: torch.Tensor
    flat_counts: torch.Tensor
    firsts: torch.Tensor
    chosen: torch.Tensor | None
    ones: torch.Tensor

    def add_tokens(self, token_ids: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Count one more token for each of the rows."""
        tokens = token_ids
        if not isinstance(tokens, torch.Tensor):
            tokens = torch.as_tensor(tokens, device=self.firsts.device)
        if self.chosen is not None:
            tokens = tokens[self.chosen]
        self.flat_counts.index_add_(0, self.firsts + tokens, self.ones)


class _PenaltyPool:
    """Vocabulary-sized state, only for rows with penalties; grows as they come, gone when none is left."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._slot = np.full(max_rows, -1, dtype=np.int64)  # of a row
        self._free: list[int] = []
        self._num_used = 0
        self._values = np.zeros((3, max_rows), dtype=np.float32)  # presence, frequency, repetition of a row
        self._prompt_mask = torch.empty((0, vocab_size), dtype=torch.bool, device=device)
        self._output_counts = torch.empty((0, vocab_size), dtype=torch.int32, device=device)

    def __contains__(self, row: int) -> bool:
        return bool(self._slot[row] >= 0)

    def add(
        self, row: int, params: SamplingParams, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]
    ) -> None:
        if not self._free:
            self._grow()
        slot = min(self._free)  # keeps slots of successive rows adjacent, see collect
        self._free.remove(slot)
        self._num_used += 1
        self._slot[row] = slot
        self._values[:, row] = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        mask = np.zeros(self.vocab_size, dtype=bool)
        mask[np.asarray(prompt_token_ids, dtype=np.int64)] = True
        counts = np.bincount(np.asarray(output_token_ids, dtype=np.int64), minlength=self.vocab_size)
        self._prompt_mask[slot] = torch.from_numpy(mask).to(self.device)
        self._output_counts[slot] = torch.from_numpy(counts.astype(np.int32)).to(self.device)

    def remove(self, row: int) -> None:
        if row not in self:
            return
        self._free.append(int(self._slot[row]))
        self._slot[row] = -1
        self._num_used -= 1
        if not self._num_used:
            self._free = []
            self._prompt_mask, self._output_counts = self._prompt_mask[:0].clone(), self._output_counts[:0].clone()

    def find(self, rows: np.ndarray) -> _Places | None:
        """Those of the (distinct) rows that have penalties; None if none has."""
        if not self._num_used:
            return None
        slots = self._slot[rows]
        where = np.flatnonzero(slots >= 0)
        if not len(where):
            return None
        slots = slots[where]
        at: slice | torch.Tensor
        if (np.diff(slots) == 1).all():
            at = slice(int(slots[0]), int(slots[-1]) + 1)  # what it takes is a view, always up to date
        else:
            at = self._to_device(slots)
        return _Places(
            where=where,
            at=at,
            output_counts=self._output_counts,
            flat_counts=self._output_counts.view(-1),
            firsts=self._to_device(slots * self.vocab_size),
            chosen=None if len(where) == len(rows) else self._to_device(where),
            ones=torch.ones(len(where), dtype=torch.int32, device=self.device),
        )

    def collect(self, rows: np.ndarray, places: _Places, metadata: SamplingMetadata) -> None:
        """Fill the penalty fields of the metadata."""
        values = self._to_device(self._values[:, rows[places.where]])
        metadata.penalty_rows = self._to_device(places.where)
        metadata.presence_penalty, metadata.frequency_penalty, metadata.repetition_penalty = values
        metadata.prompt_mask = self._prompt_mask[places.at]
        metadata.output_counts = self._output_counts[places.at]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _grow(self) -> None:
        old = len(self._prompt_mask)
        more = min(max(old, 1), len(self._slot) - old)
        # Outside inference mode, so that the pool may be updated in and out of it.
        with torch.inference_mode(False):
            self._prompt_mask = torch.cat([self._prompt_mask, self._prompt_mask.new_zeros((more, self.vocab_size))])
            self._output_counts = torch.cat(
                [self._output_counts, self._output_counts.new_zeros((more, self.vocab_size))]
            )
        self._free.extend(range(old, old + more))


def worst_case_metadata(num_rows: int, device: torch.device) -> SamplingMetadata:
    """For the profiling run: every row sampled with all filters on, which is what takes the most memory."""

    def filled(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    return SamplingMetadata(
        all_greedy=False,
        temperature=filled(0.5),
        top_k=filled(50, torch.int32),
        top_p=filled(0.9),
        min_p=filled(0.01),
        uniform=filled(0.5),
        num_logprobs=1,
    )


def to_token_logprobs(output: SamplerOutput, wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Each row's own number of log probabilities out of the batch's; None for rows that want none.

    wanted: `SamplingParams.logprobs` of each row: None, or how many besides the chosen token.
    """
    if output.logprobs is None:
        return [None] * len(wanted)
    assert output.logprob_token_ids is not None
    assert output.ranks is not None
    ids, values, ranks = output.logprob_token_ids.tolist(), output.logprobs.tolist(), output.ranks.tolist()
    return [
        None if num is None else TokenLogprobs(token_ids=i[: 1 + num], logprobs=v[: 1 + num], rank=r)
        for num, i, v, r in zip(wanted, ids, values, ranks, strict=True)
    ]
