"""The requests a worker knows, in pre-allocated rows, and the flat tensors of one step made from them."""

from dataclasses import dataclass

import numpy as np
import torch

from atom.layers.attention.base import AttentionMetadata
from atom.model_engine.protocol import NewRequest, ScheduledBatch
from atom.sampling_params import SamplingParams


@dataclass(slots=True)
class StepInput:
    """One step, requests with a single token first.

    rows: int64 [R], their rows; input_ids, positions: int64 [T]; counts: int64 [R] tokens a request.
    sampling: indices into rows of the requests whose last known token is computed now.
    logits_indices: int64 [S] on the device, the flat token each of those samples from.
    """

    rows: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampling: np.ndarray
    logits_indices: torch.Tensor


class InputBatch:
    """Rows are stable: a request keeps its row until it is removed, so a step only changes what differs."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.device = device
        self.block_size = block_size
        self.max_model_len = max_model_len
        max_blocks = -(-max_model_len // block_size)
        # Zero pages are taken from the system only when written.
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.request_ids: list[str] = [""] * max_num_seqs
        self.row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: NewRequest) -> int:
        """Take a row for the request and fill it."""
        row = self._free_rows.pop()
        self.row_of[request.request_id] = row
        self.request_ids[row] = request.request_id
        count = len(request.token_ids)
        self.tokens[row, :count] = request.token_ids
        self.num_tokens[row] = count
        self.num_prompt[row] = request.num_prompt_tokens
        self.num_computed[row] = request.num_computed_tokens
        self.num_blocks[row] = 0
        self.params[row] = request.sampling_params
        self.append_blocks(row, request.block_ids)
        return row

    def remove(self, request_id: str) -> int:
        row = self.row_of.pop(request_id)
        self.params[row] = None
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
        rows = np.fromiter((self.row_of[r] for r in scheduled), dtype=np.int64, count=len(scheduled))
        counts = np.fromiter(scheduled.values(), dtype=np.int64, count=len(scheduled))
        num_decodes = int((counts == 1).sum())
        if 0 < num_decodes < len(rows):
            order = np.argsort(counts != 1, kind="stable")
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
        blocks, offsets = np.divmod(positions, self.block_size)
        slots = table[table_rows, blocks].astype(np.int64) * self.block_size + offsets
        sampling = np.flatnonzero(seq_lens == self.num_tokens[rows])
        metadata = AttentionMetadata(
            query_start_loc=self._to_device(starts),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            block_table=self._to_device(table),
            slot_mapping=self._to_device(slots),
            num_decodes=num_decodes,
            max_query_len=int(counts.max()),
            max_seq_len=int(seq_lens.max()),
        )
        return StepInput(
            rows=rows,
            counts=counts,
            starts=starts,
            input_ids=self._to_device(input_ids),
            positions=self._to_device(positions),
            metadata=metadata,
            sampling=sampling,
            logits_indices=self._to_device(starts[1:][sampling].astype(np.int64) - 1),
        )

    def commit(self, step: StepInput, sampled: np.ndarray) -> None:
        """Advance after a step; sampled: int64 [S], one token for each of step.sampling."""
        self.num_computed[step.rows] += step.counts
        rows = step.rows[step.sampling]
        self.tokens[rows, self.num_tokens[rows]] = sampled
        self.num_tokens[rows] += 1

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
