"""What the sampler must know about each request, kept in rows between steps.

A step only changes what differs: static parameters are collected again when the rows do, and what
changes every step (random numbers, output counts) is computed for all rows at once.
"""

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
        self._num_output = np.zeros(max_rows, dtype=np.int64)
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
        self._built = None

    def remove(self, row: int) -> None:
        """Free a row."""
        assert self._live[row], f"row {row} is not in use"
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
        self._built = None

    def append(self, rows: Sequence[int] | np.ndarray, token_ids: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """A step gave each of these (distinct) rows one token. A tensor on the device is not waited for."""
        if not self._num_special:
            return  # plain greedy rows count nothing, and never become anything else
        rows = np.asarray(rows, dtype=np.int64)
        self._num_output[rows] += 1
        if self._penalties:
            self._penalties.append(rows, token_ids)
        if self._suppressed:
            for row in [r for r in self._suppressed if self._num_output[r] >= self._min_tokens[r]]:
                del self._suppressed[row]
                self._min_tokens[row] = 0
                self._classify(row)
                self._built = None

    def build(self, rows: Sequence[int] | np.ndarray) -> SamplingMetadata:
        """The metadata for a step in which these (distinct) rows sample, in this order.

        Valid until the next call: the object may be used again with other tensors.
        """
        if not self._num_special:
            return _PLAIN_GREEDY
        rows = np.asarray(rows, dtype=np.int64)
        built, key = self._built, rows.tobytes()
        if built is None or built.key != key:
            built = self._built = self._collect(rows, key)
        if not built.is_static:
            self._refresh(built)
        return built.metadata

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

    def _collect(self, rows: np.ndarray, key: bytes) -> "_Built":
        """All that stays the same while the rows do."""
        if not self._special[rows].any():
            return _Built(key, _PLAIN_GREEDY)
        temperature = self._temperature[rows]
        metadata = SamplingMetadata(all_greedy=not temperature.any())
        built = _Built(key, metadata)
        if not metadata.all_greedy:
            top_k, top_p, min_p = self._top_k[rows], self._top_p[rows], self._min_p[rows]
            metadata.temperature = self._to_device(temperature)
            metadata.top_k = self._to_device(top_k) if (top_k < self.vocab_size).any() else None
            metadata.top_p = self._to_device(top_p) if (top_p < 1).any() else None
            metadata.min_p = self._to_device(min_p) if min_p.any() else None
            built.random_rows = rows
        logprobs = self._num_logprobs[rows]
        metadata.num_logprobs = int(logprobs.max())
        if metadata.num_logprobs >= 0 and logprobs.min() < 0:
            metadata.logprob_rows = self._to_device(np.flatnonzero(logprobs >= 0))
        self._collect_bias(rows, metadata)
        if self._penalties:
            built.penalty_slots = self._penalties.collect(rows, metadata)
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
        metadata = built.metadata
        if built.random_rows is not None:
            metadata.uniform = self._uniform(built, built.random_rows)
        if built.penalty_slots is not None:
            metadata.output_counts = self._penalties.counts(built.penalty_slots)

    def _uniform(self, built: "_Built", rows: np.ndarray) -> torch.Tensor:
        """Random numbers of the rows' next tokens, made for several steps at a time."""
        positions = self._num_output[rows]
        if built.positions is not None:
            ahead = int(positions[0] - built.positions[0])
            if 0 <= ahead < _STEPS_AHEAD and (positions - ahead == built.positions).all():
                return built.uniform[ahead, : len(rows)]
        built.positions = positions
        padded = np.zeros((_STEPS_AHEAD, -(-len(rows) // 4) * 4), dtype=np.float32)  # so that each row is aligned
        padded[:, : len(rows)] = uniform_of_key(self._key[rows], positions + np.arange(_STEPS_AHEAD)[:, None])
        built.uniform = self._to_device(padded)
        return built.uniform[0, : len(rows)]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class _Built:
    """The last metadata and what is needed to bring it up to date."""

    __slots__ = ("key", "metadata", "penalty_slots", "positions", "random_rows", "uniform")

    def __init__(self, key: bytes, metadata: SamplingMetadata) -> None:
        self.key = key
        self.metadata = metadata
        self.random_rows: np.ndarray | None = None
        self.uniform = torch.empty(0)  # float32 [_STEPS_AHEAD, >= R] on the device, from these positions on:
        self.positions: np.ndarray | None = None
        self.penalty_slots: slice | torch.Tensor | None = None

    @property
    def is_static(self) -> bool:
        return self.random_rows is None and not isinstance(self.penalty_slots, torch.Tensor)


class _Places(NamedTuple):
    """Of rows in the pool: where the counts of those with penalties begin, int64 [P]; which they are, None: all."""

    rows: np.ndarray
    firsts: torch.Tensor
    where: torch.Tensor | None
    ones: torch.Tensor  # int32 [P]


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
        self._places: _Places | None = None  # of the last append; None once slots have changed

    def __bool__(self) -> bool:
        return self._num_used > 0

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
        self._places = None
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
        self._places = None
        self._num_used -= 1
        if not self._num_used:
            self._free = []
            self._prompt_mask, self._output_counts = self._prompt_mask[:0].clone(), self._output_counts[:0].clone()

    def append(self, rows: np.ndarray, token_ids: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Count one more token for those of the (distinct) rows that have penalties."""
        places = self._places
        if places is None or places.rows is not rows:  # mostly the last step's array
            places = self._places = self._find(rows)
        if not len(places.firsts):
            return
        tokens = torch.as_tensor(token_ids, device=self.device)
        if places.where is not None:
            tokens = tokens[places.where]
        self._output_counts.view(-1).index_add_(0, places.firsts + tokens, places.ones)

    def _find(self, rows: np.ndarray) -> "_Places":
        slots = self._slot[rows]
        where = np.flatnonzero(slots >= 0)
        firsts = torch.from_numpy(slots[where] * self.vocab_size).to(self.device, non_blocking=True)
        return _Places(
            rows,
            firsts,
            None if len(where) == len(rows) else torch.from_numpy(where).to(self.device, non_blocking=True),
            torch.ones(len(where), dtype=torch.int32, device=self.device),
        )

    def collect(self, rows: np.ndarray, metadata: SamplingMetadata) -> slice | torch.Tensor | None:
        """Fill the penalty fields of the metadata; returns where the pool holds them, None for none."""
        slots = self._slot[rows]
        where = np.flatnonzero(slots >= 0)
        if not len(where):
            return None
        slots = slots[where]
        at: slice | torch.Tensor
        if (np.diff(slots) == 1).all():
            at = slice(int(slots[0]), int(slots[-1]) + 1)  # a view, always up to date
        else:
            at = torch.from_numpy(slots).to(self.device)
        values = torch.from_numpy(self._values[:, rows[where]]).to(self.device)
        metadata.penalty_rows = torch.from_numpy(where).to(self.device)
        metadata.presence_penalty, metadata.frequency_penalty, metadata.repetition_penalty = values
        metadata.prompt_mask = self._prompt_mask[at]
        metadata.output_counts = self._output_counts[at]
        return at

    def counts(self, at: slice | torch.Tensor) -> torch.Tensor:
        return self._output_counts[at]

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
