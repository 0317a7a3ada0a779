"""The requests a worker knows, in pre-allocated rows, and the flat tensors of one step made from them."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from atom.compilation.cuda_graph import Dispatch
from atom.config import CUDAGraphMode
from atom.layers.attention.base import AttentionMetadata, OnHost
from atom.layers.attention.long_prompts import LongPrompts
from atom.model_engine.protocol import NewRequest, ScheduledBatch
from atom.model_engine.static_inputs import StaticInputs
from atom.sampling_params import SamplingParams


@dataclass(slots=True)
class StepInput:
    """One step, requests with a single token first. R requests, T tokens, S of the requests sample.

    rows, counts: int64 [R], each request's row and number of tokens; starts: int32 [R + 1], its first flat token.
    input_ids, positions: int64 [T]. sampled_rows: int64 [S], rows of the requests whose last token is computed now;
    request_ids: theirs; logits_indices: int64 [S] on the device, the flat token each samples from. graph: what replays
    the step, None for nothing; input_ids then get their values from StaticInputs.resolve, and tensors hold until the
    next step is prepared.
    """

    rows: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampled_rows: np.ndarray
    request_ids: list[str]
    logits_indices: torch.Tensor
    sampling_rows: torch.Tensor  # int64 [S] on the device: sampled_rows
    graph: Dispatch | None = None


class _Flat(NamedTuple):
    """A step's tokens and requests on the host, as arrays of any integer type."""

    rows: np.ndarray  # [R]
    counts: np.ndarray
    starts: np.ndarray  # [R + 1]
    seq_lens: np.ndarray
    token_rows: np.ndarray  # [T]
    positions: np.ndarray
    slots: np.ndarray
    num_decodes: int
    sampling: np.ndarray | None  # [S], indices into rows; None: all
    sampled_rows: np.ndarray


class _Scheduled:
    """The requests of the last step, mostly the next step's, too, and what stays the same for them."""

    def __init__(self, request_ids: list[str], rows: np.ndarray, num_blocks: int) -> None:
        self.request_ids = request_ids
        self.rows = rows
        self.first_cells = rows * num_blocks  # in the flat block table
        self.ones = np.ones(len(rows), dtype=np.int64)
        self.indices = np.arange(len(rows) + 1, dtype=np.int32)
        self.have_sampled = False  # each of them, so that its last token is on the device
        # Of plain decode steps, once there was one: logits_indices, sampling_rows, query_start_loc.
        self.on_device: list[torch.Tensor] | None = None


class InputBatch:
    """Rows are stable: a request keeps its row until it is removed, so a step only changes what differs.

    A sampled token stays on the device (`last_token`) and is the next step's input there, so that the next
    step can be prepared before the host knows the token. long_prompts: how their parts are cut from a step; static:
    where steps that graphs replay are written, None if there are none.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        long_prompts: LongPrompts | None = None,
        static: StaticInputs | None = None,
    ) -> None:
        self.device = device
        self.static = static
        self.long_prompts = long_prompts
        self.block_size = block_size
        self.max_model_len = max_model_len
        max_blocks = -(-max_model_len // block_size)
        # What requests came with. Zero pages are taken from the system only when written.
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.last_token = (
            torch.zeros(max_num_seqs, dtype=torch.int64, device=device) if static is None else static.last_token
        )
        self._has_sampled = np.zeros(max_num_seqs, dtype=bool)  # since it was added
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.request_ids: list[str] = [""] * max_num_seqs
        self.row_of: dict[str, int] = {}
        self._scheduled: _Scheduled | None = None
        self._cells = self.block_table.reshape(-1)
        # Which rows the device's block table holds, and what they have got since.
        self._table_rows: np.ndarray | None = None
        self._appended: list[tuple[int, int, list[int]]] = []
        self._place_of: dict[int, int] = {}  # a row's, among them
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: NewRequest) -> int:
        """Take a row for the request and fill it."""
        row = self._free_rows.pop()
        self.row_of[request.request_id] = row
        self._scheduled = None
        self.request_ids[row] = request.request_id
        count = len(request.token_ids)
        self.tokens[row, :count] = request.token_ids
        self.num_tokens[row] = count
        self.num_prompt[row] = request.num_prompt_tokens
        self.num_computed[row] = request.num_computed_tokens
        self.num_blocks[row] = 0
        self._has_sampled[row] = False
        self.params[row] = request.sampling_params
        self.append_blocks(row, request.block_ids)
        return row

    def remove(self, request_id: str) -> int:
        row = self.row_of.pop(request_id)
        self.params[row] = None
        self._scheduled = None
        self.request_ids[row] = ""
        self._free_rows.append(row)
        return row

    def append_blocks(self, row: int, block_ids: list[int]) -> None:
        if block_ids:
            start = int(self.num_blocks[row])
            self.block_table[row, start : start + len(block_ids)] = block_ids
            self.num_blocks[row] = start + len(block_ids)
            if self._table_rows is not None:
                self._appended.append((row, start, block_ids))

    def prepare(self, batch: ScheduledBatch) -> StepInput:
        """Flatten the scheduled tokens of all requests; vectorized over requests and tokens."""
        scheduled = self._look_up(list(batch.num_scheduled_tokens))
        is_decode = batch.total_tokens == len(scheduled.rows)
        flat = self._flatten_decodes(scheduled) if is_decode else self._flatten(scheduled, batch)
        request_ids = scheduled.request_ids
        if flat.sampling is not None or flat.rows is not scheduled.rows:
            request_ids = [self.request_ids[row] for row in flat.sampled_rows.tolist()]
        if self.static is not None:
            graph = self.static.dispatcher.dispatch(batch.total_tokens, is_decode)
            if graph.kind is not CUDAGraphMode.NONE:
                return self._place_static(self.static, graph, scheduled, flat, request_ids)
        return self._place(scheduled, flat, request_ids)

    def advance(self, step: StepInput, sampled: torch.Tensor | None) -> None:
        """Count a step as done; sampled: int64 [S] on the device, one token for each of step.sampled_rows."""
        self.num_computed[step.rows] += step.counts
        if sampled is not None:
            self.last_token.index_copy_(0, step.sampling_rows, sampled)
            self.num_tokens[step.sampled_rows] += 1
            if self._scheduled is None or not self._scheduled.have_sampled:
                self._has_sampled[step.sampled_rows] = True

    def _look_up(self, request_ids: list[str]) -> _Scheduled:
        if self._scheduled is None or request_ids != self._scheduled.request_ids:
            rows = np.fromiter((self.row_of[i] for i in request_ids), np.int64, len(request_ids))
            self._scheduled = _Scheduled(request_ids, rows, self.block_table.shape[1])
        return self._scheduled

    def _flatten_decodes(self, scheduled: _Scheduled) -> _Flat:
        rows = scheduled.rows
        positions = self.num_computed[rows]
        seq_lens = positions + 1
        blocks, slots = np.divmod(positions, self.block_size)
        blocks += scheduled.first_cells
        slots += np.multiply(self._cells[blocks], self.block_size, dtype=np.int64)
        at_end = seq_lens == self.num_tokens[rows]
        sampling = None if at_end.all() else np.flatnonzero(at_end)
        return _Flat(
            rows=rows,
            counts=scheduled.ones,
            starts=scheduled.indices,
            seq_lens=seq_lens,
            token_rows=rows,
            positions=positions,
            slots=slots,
            num_decodes=len(rows),
            sampling=sampling,
            sampled_rows=rows if sampling is None else rows[sampling],
        )

    def _flatten(self, scheduled: _Scheduled, batch: ScheduledBatch) -> _Flat:
        rows = scheduled.rows
        counts = np.fromiter(batch.num_scheduled_tokens.values(), dtype=np.int64, count=len(rows))
        order = np.argsort(counts, kind="stable")  # long ones last: the kernels of the rest then leave them out
        rows, counts = rows[order], counts[order]
        computed = self.num_computed[rows]
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        seq_lens = computed + counts
        table_rows = np.repeat(np.arange(len(rows)), counts)
        token_rows = rows[table_rows]
        positions = np.arange(starts[-1]) - (starts[:-1].astype(np.int64) - computed)[table_rows]
        blocks, offsets = np.divmod(positions, self.block_size)
        sampling = np.flatnonzero(seq_lens == self.num_tokens[rows])
        return _Flat(
            rows=rows,
            counts=counts,
            starts=starts,
            seq_lens=seq_lens,
            token_rows=token_rows,
            positions=positions,
            slots=self.block_table[token_rows, blocks].astype(np.int64) * self.block_size + offsets,
            num_decodes=int((counts == 1).sum()),
            sampling=sampling,
            sampled_rows=rows[sampling],
        )

    def _place(self, scheduled: _Scheduled, flat: _Flat, request_ids: list[str]) -> StepInput:
        """For a step that runs plainly, in memory of its own."""
        self._table_rows = None
        self._appended.clear()
        rows, starts, seq_lens = flat.rows, flat.starts, flat.seq_lens
        longest_seq = int(seq_lens.max())
        table = self.block_table[rows, : -(-longest_seq // self.block_size)]
        arrays = [flat.positions, flat.slots, seq_lens.astype(np.int32), table]
        all_sampled = self._all_sampled(scheduled, flat)
        constants = scheduled.on_device if all_sampled else None
        if constants is None:
            arrays += [_last_tokens(flat), flat.sampled_rows, starts]
        if not all_sampled:
            sampled = np.flatnonzero(self._has_sampled[flat.token_rows])
            known = self.tokens[flat.token_rows, flat.positions].astype(np.int64)
            arrays += [known, sampled, flat.token_rows[sampled]]
        on_device = self._to_device(arrays)
        positions_d, slots_d, lens, table_d = on_device[:4]
        logits_indices, sampling_rows, starts_d = constants or on_device[4:7]
        if all_sampled:
            scheduled.on_device = [logits_indices, sampling_rows, starts_d]
            ids = self.last_token.index_select(0, sampling_rows)
        else:
            ids, at, last_rows = on_device[7:]
            if len(at):
                ids.index_copy_(0, at, self.last_token.index_select(0, last_rows))
        metadata = AttentionMetadata(
            query_start_loc=starts_d,
            seq_lens=lens,
            block_table=table_d,
            slot_mapping=slots_d,
            num_decodes=flat.num_decodes,
            max_query_len=int(flat.counts[-1]),
            max_seq_len=longest_seq,
            on_host=OnHost(starts, seq_lens),
        )
        self._cut_long_prompts(flat, metadata)
        return StepInput(
            rows=rows,
            counts=flat.counts,
            starts=starts,
            input_ids=ids,
            positions=positions_d,
            metadata=metadata,
            sampled_rows=flat.sampled_rows,
            request_ids=request_ids,
            logits_indices=logits_indices,
            sampling_rows=sampling_rows,
        )

    def _place_static(
        self,
        static: StaticInputs,
        graph: Dispatch,
        scheduled: _Scheduled,
        flat: _Flat,
        request_ids: list[str],
    ) -> StepInput:
        """For a step that a graph replays, where the graph reads it."""
        size, num_tokens, num_requests = graph.size, len(flat.positions), len(flat.rows)
        num_sampled = len(flat.sampled_rows)
        is_decode = flat.num_decodes == num_requests
        host = static.begin(size)
        host.positions[:num_tokens] = flat.positions
        host.slots[:num_tokens] = flat.slots
        host.seq_lens[:num_requests] = flat.seq_lens
        host.sampling_rows[:num_sampled] = flat.sampled_rows
        if flat.sampling is not None:
            host.logits_indices[:num_sampled] = _last_tokens(flat)
        if not is_decode:
            host.starts[: num_requests + 1] = flat.starts
            host.starts[num_requests + 1 :] = num_tokens  # requests that don't exist are empty
        self._write_tokens(static, host.source, host.known, scheduled, flat)
        if num_tokens < size:
            host.positions[num_tokens:] = 0
            host.slots[num_tokens:] = -1
            host.source[num_tokens:] = 0
        host.seq_lens[num_requests:] = 0
        self._write_table(static, host.table_at, host.table_to, flat.rows)
        static.send(size)
        if is_decode:
            views = static.decodes(size, num_requests)
            ids, positions, slots, logits_indices, sampling_rows, seq_lens, starts, table = views
        else:
            d = static.on_device(size)
            ids, positions, slots = d.ids[:num_tokens], d.positions[:num_tokens], d.slots[:num_tokens]
            logits_indices, sampling_rows = d.logits_indices, d.sampling_rows
            seq_lens, starts = d.seq_lens[:num_requests], d.starts[: num_requests + 1]
            table = static.block_table[:num_requests]
        if num_sampled != len(logits_indices):
            logits_indices, sampling_rows = logits_indices[:num_sampled], sampling_rows[:num_sampled]
        metadata = AttentionMetadata(
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_table=table,
            slot_mapping=slots,
            num_decodes=flat.num_decodes,
            max_query_len=int(flat.counts[-1]),
            max_seq_len=int(flat.seq_lens.max()),
            on_host=OnHost(flat.starts, flat.seq_lens),
        )
        if graph.kind is not CUDAGraphMode.FULL:
            self._cut_long_prompts(flat, metadata)
        return StepInput(
            rows=flat.rows,
            counts=flat.counts,
            starts=flat.starts,
            input_ids=ids,
            positions=positions,
            metadata=metadata,
            sampled_rows=flat.sampled_rows,
            request_ids=request_ids,
            logits_indices=logits_indices,
            sampling_rows=sampling_rows,
            graph=graph,
        )

    def _write_tokens(
        self, static: StaticInputs, source: np.ndarray, known: np.ndarray, scheduled: _Scheduled, flat: _Flat
    ) -> None:
        """Where the tokens' values are, and those that are not on the device yet."""
        rows, num_tokens = flat.token_rows, len(flat.token_rows)
        if self._all_sampled(scheduled, flat):
            source[:num_tokens] = rows
            return
        known[:num_tokens] = self.tokens[rows, flat.positions]
        source[:num_tokens] = np.where(self._has_sampled[rows], rows, static.num_rows + np.arange(num_tokens))

    def _all_sampled(self, scheduled: _Scheduled, flat: _Flat) -> bool:
        """Whether every token of the step is on the device: all are decodes whose last token was sampled there."""
        if flat.token_rows is not scheduled.rows:
            return False
        if not scheduled.have_sampled:
            scheduled.have_sampled = bool(self._has_sampled[scheduled.rows].all())
        return scheduled.have_sampled

    def _write_table(self, static: StaticInputs, at: np.ndarray, to: np.ndarray, rows: np.ndarray) -> None:
        """What the device's block table lacks: a few cells, or, for other requests than the last step's, all rows."""
        cells: list[int] = []
        values: list[int] = []
        if rows is not self._table_rows:
            static.send_table(self.block_table, rows, int(self.num_blocks[rows].max()))
            self._table_rows = rows
            self._appended.clear()
            self._place_of = dict(zip(rows.tolist(), range(len(rows)), strict=True))
        elif self._appended:
            for row, start, block_ids in self._appended:
                place = self._place_of.get(row)
                if place is not None:
                    first = place * static.num_columns + start
                    cells.extend(range(first, first + len(block_ids)))
                    values.extend(block_ids)
            if len(cells) > len(at):
                self._table_rows = None
                self._write_table(static, at, to, rows)
                return
            self._appended.clear()
            at[: len(cells)] = cells
            to[: len(cells)] = values
        at[len(cells) :] = static.num_cells

    def _cut_long_prompts(self, flat: _Flat, metadata: AttentionMetadata) -> None:
        if self.long_prompts is None or metadata.max_query_len < self.long_prompts.shortest:
            return
        cut = self.long_prompts.cut(flat.starts, flat.seq_lens - flat.counts)
        if cut is None:
            return
        metadata.long_parts = cut.parts
        if not len(cut.requests):
            return
        starts, lens, requests = self._to_device([cut.query_start_loc, cut.seq_lens, cut.requests])
        metadata.rest = replace(
            metadata,
            query_start_loc=starts,
            seq_lens=lens,
            block_table=metadata.block_table.index_select(0, requests),
            slot_mapping=metadata.slot_mapping[: int(cut.query_start_loc[-1])],
            max_query_len=int(np.diff(cut.query_start_loc).max()),
            max_seq_len=int(cut.seq_lens.max()),
            long_parts=(),
            on_host=OnHost(cut.query_start_loc, cut.seq_lens),
        )

    def _to_device(self, arrays: list[np.ndarray]) -> list[torch.Tensor]:
        """All arrays in one asynchronous copy; on a CPU they are shared, not copied."""
        if self.device.type == "cpu":
            return [torch.from_numpy(a) for a in arrays]
        offsets = np.cumsum([0, *(-(-a.nbytes // 16) * 16 for a in arrays)]).tolist()
        staging = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=True)
        flat = staging.numpy()
        for array, offset in zip(arrays, offsets, strict=False):
            flat[offset : offset + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        moved = staging.to(self.device, non_blocking=True)
        return [
            moved[offset : offset + a.nbytes].view(torch.from_numpy(a[:0]).dtype).view(a.shape)
            for a, offset in zip(arrays, offsets, strict=False)
        ]


def _last_tokens(flat: _Flat) -> np.ndarray:
    """int64 [S]: the flat token that each request samples from."""
    ends = flat.starts[1:] if flat.sampling is None else flat.starts[1:][flat.sampling]
    return ends.astype(np.int64) - 1
