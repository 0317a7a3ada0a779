"""The requests a worker knows, in pre-allocated rows, and the flat tensors of one step made from them."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from atom.layers.attention.base import AttentionMetadata, OnHost
from atom.layers.attention.long_prompts import LongPrompts
from atom.model_engine.protocol import NewRequest, ScheduledBatch
from atom.sampling_params import SamplingParams


@dataclass(slots=True)
class StepInput:
    """One step, requests with a single token first. R requests, T tokens, S of the requests sample.

    rows, counts: int64 [R], each request's row and number of tokens; starts: int32 [R + 1], its first flat token.
    input_ids, positions: int64 [T]. sampling: int64 [S], indices into rows of the requests whose last token is
    computed now; request_ids: theirs; occupancy: of their rows, see InputBatch; logits_indices: int64 [S] on the
    device, the flat token each samples from.
    """

    rows: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampling: np.ndarray
    occupancy: np.ndarray
    request_ids: list[str]
    logits_indices: torch.Tensor
    sampling_rows: torch.Tensor  # int64 [S] on the device: rows[sampling]


class InputBatch:
    """Rows are stable: a request keeps its row until it is removed, so a step only changes what differs.

    A sampled token stays on the device (`last_token`) and is the next step's input there, so that the next
    step can be prepared before the host knows the token. long_prompts: how their parts are cut from a step.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        long_prompts: LongPrompts | None = None,
    ) -> None:
        self.device = device
        self.long_prompts = long_prompts
        self.block_size = block_size
        self.max_model_len = max_model_len
        max_blocks = -(-max_model_len // block_size)
        # Zero pages are taken from the system only when written.
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)  # pending ones included
        self.num_known = np.zeros(max_num_seqs, dtype=np.int64)  # tokens whose value is in `tokens`
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.request_ids: list[str] = [""] * max_num_seqs
        self.row_of: dict[str, int] = {}
        self.occupancy = np.zeros(max_num_seqs, dtype=np.int64)  # how many requests a row has had
        self._scheduled: list[str] = []  # of the last step, and their rows: mostly the next step's, too
        self._scheduled_rows = np.empty(0, dtype=np.int64)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: NewRequest) -> int:
        """Take a row for the request and fill it."""
        row = self._free_rows.pop()
        self.row_of[request.request_id] = row
        self.occupancy[row] += 1
        self._scheduled = []
        self.request_ids[row] = request.request_id
        count = len(request.token_ids)
        self.tokens[row, :count] = request.token_ids
        self.num_tokens[row] = self.num_known[row] = count
        self.num_prompt[row] = request.num_prompt_tokens
        self.num_computed[row] = request.num_computed_tokens
        self.num_blocks[row] = 0
        self.params[row] = request.sampling_params
        self.append_blocks(row, request.block_ids)
        return row

    def remove(self, request_id: str) -> int:
        row = self.row_of.pop(request_id)
        self.params[row] = None
        self.occupancy[row] += 1
        self._scheduled = []
        self.request_ids[row] = ""
        self._free_rows.append(row)
        return row

    def append_blocks(self, row: int, block_ids: list[int]) -> None:
        if block_ids:
            start = self.num_blocks[row]
            self.block_table[row, start : start + len(block_ids)] = block_ids
            self.num_blocks[row] = start + len(block_ids)

    def prepare(self, batch: ScheduledBatch) -> StepInput:
        """Flatten the scheduled tokens of all requests; vectorized over requests and tokens."""
        scheduled = batch.num_scheduled_tokens
        rows = self._rows_of(list(scheduled))
        counts = np.fromiter(scheduled.values(), dtype=np.int64, count=len(scheduled))
        num_decodes = int((counts == 1).sum())
        if num_decodes < len(rows):  # long ones last: the kernels of the rest then leave them out
            order = np.argsort(counts, kind="stable")
            rows, counts = rows[order], counts[order]
        computed = self.num_computed[rows]
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        seq_lens = computed + counts
        table = self.block_table[rows, : -(-int(seq_lens.max()) // self.block_size)]
        if num_decodes == len(rows):
            token_rows, table_rows, positions = rows, np.arange(len(rows)), computed
        else:
            table_rows = np.repeat(np.arange(len(rows)), counts)
            token_rows = rows[table_rows]
            positions = np.arange(starts[-1]) - (starts[:-1].astype(np.int64) - computed)[table_rows]
        input_ids = self.tokens[token_rows, positions].astype(np.int64)
        pending = np.flatnonzero(positions >= self.num_known[token_rows])
        blocks, offsets = np.divmod(positions, self.block_size)
        slots = table[table_rows, blocks].astype(np.int64) * self.block_size + offsets
        sampling = np.flatnonzero(seq_lens == self.num_tokens[rows])
        sampling_rows = rows[sampling]
        longest = int(counts.max())
        cut = None
        if self.long_prompts is not None and longest >= self.long_prompts.shortest:
            cut = self.long_prompts.cut(starts, computed)
        on_device = self._to_device(
            [
                input_ids,
                positions,
                slots,
                starts[1:][sampling].astype(np.int64) - 1,
                sampling_rows,
                pending,
                token_rows[pending],
                starts,
                seq_lens.astype(np.int32),
                table,
                *((cut.query_start_loc, cut.seq_lens, cut.requests) if cut is not None else ()),
            ]
        )
        ids, positions_d, slots_d, logits_indices, sampling_rows_d, pending_d, pending_rows = on_device[:7]
        starts_d, lens, table_d = on_device[7:10]
        if len(pending):
            ids[pending_d] = self.last_token[pending_rows]
        metadata = AttentionMetadata(
            query_start_loc=starts_d,
            seq_lens=lens,
            block_table=table_d,
            slot_mapping=slots_d,
            num_decodes=num_decodes,
            max_query_len=longest,
            max_seq_len=int(seq_lens.max()),
            on_host=OnHost(starts, seq_lens),
        )
        if cut is not None:
            metadata.long_parts = cut.parts
            if len(cut.requests):
                rest_starts, rest_lens, requests = on_device[10:]
                metadata.rest = replace(
                    metadata,
                    query_start_loc=rest_starts,
                    seq_lens=rest_lens,
                    block_table=table_d.index_select(0, requests),
                    slot_mapping=slots_d[: int(cut.query_start_loc[-1])],
                    max_query_len=int(np.diff(cut.query_start_loc).max()),
                    max_seq_len=int(cut.seq_lens.max()),
                    long_parts=(),
                    on_host=OnHost(cut.query_start_loc, cut.seq_lens),
                )
        return StepInput(
            rows=rows,
            counts=counts,
            starts=starts,
            input_ids=ids,
            positions=positions_d,
            metadata=metadata,
            sampling=sampling,
            occupancy=self.occupancy[sampling_rows],
            request_ids=[self.request_ids[row] for row in sampling_rows.tolist()],
            logits_indices=logits_indices,
            sampling_rows=sampling_rows_d,
        )

    def advance(self, step: StepInput, sampled: torch.Tensor | None) -> None:
        """Count a step as done; sampled: int64 [S] on the device, one token for each of step.sampling."""
        self.num_computed[step.rows] += step.counts
        if sampled is not None:
            self.last_token[step.sampling_rows] = sampled
            self.num_tokens[step.rows[step.sampling]] += 1

    def learn(self, step: StepInput, sampled: np.ndarray) -> None:
        """Take in the values of a step's tokens, for rows that still belong to the same request."""
        rows = step.rows[step.sampling]
        same = self.occupancy[rows] == step.occupancy
        rows = rows[same]
        self.tokens[rows, self.num_known[rows]] = sampled[same]
        self.num_known[rows] += 1

    def _rows_of(self, request_ids: list[str]) -> np.ndarray:
        if request_ids != self._scheduled:
            self._scheduled = request_ids
            self._scheduled_rows = np.fromiter((self.row_of[i] for i in request_ids), np.int64, len(request_ids))
        return self._scheduled_rows

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
