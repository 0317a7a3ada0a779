"""What CUDA graphs read: memory at fixed addresses, brought up to date by one copy a step."""

from collections import deque
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from atom.compilation.cuda_graph import GraphDispatcher
from atom.platforms.base import Fence, Platform


class HostInputs(NamedTuple):
    """Where a step is written for batches padded to S tokens; what isn't written keeps an older step's values.

    known: int64 [S], values of tokens that the host knows; source: int64 [S], where each token's value is, the row
    of a request whose token is on the device, or num_rows + its place in `known`; positions: int64 [S];
    slots: int64 [S], -1 = padding; logits_indices, sampling_rows: int64 [S]; table_at: int64 [S], cells of the block
    table that change, num_cells = none; table_to: int32 [S], to what; seq_lens: int32 [S]; starts: int32 [S + 1].
    """

    known: np.ndarray
    source: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    logits_indices: np.ndarray
    sampling_rows: np.ndarray
    table_at: np.ndarray
    table_to: np.ndarray
    seq_lens: np.ndarray
    starts: np.ndarray


class DeviceInputs(NamedTuple):
    """The same on the device, but for `known`: ids, int64 [S], are the tokens' values once `resolve` has run."""

    ids: torch.Tensor
    source: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits_indices: torch.Tensor
    sampling_rows: torch.Tensor
    table_at: torch.Tensor
    table_to: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor


class Views(NamedTuple):
    """Of DeviceInputs, for a batch of R requests, one token each."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits_indices: torch.Tensor
    sampling_rows: torch.Tensor
    seq_lens: torch.Tensor
    one_token_each: torch.Tensor
    block_table: torch.Tensor


_IS_LONG = (True,) * 7 + (False,) * 3  # int64 or int32, of the fields of HostInputs


@cache
def _spans(size: int) -> list[tuple[int, int]]:
    """(first byte, end) of each field of HostInputs; all are aligned as kernels like it."""
    lengths = [(8 if is_long else 4) * size for is_long in _IS_LONG]
    lengths[-1] += 4  # where the last request ends
    starts = np.cumsum([0, *(-(-length // 16) * 16 for length in lengths)]).tolist()
    return [(start, start + length) for start, length in zip(starts, lengths, strict=False)]


class StaticInputs:
    """The host writes a step's inputs with `begin` and `send`; graphs begin with `resolve`.

    A graph never sees the next step's inputs: they come by a copy on the same stream, which waits for the graph. And
    a copy never sees the step after: the host writes to a buffer that the fence says has been read, or to a new one.
    The block table stays on the device, [requests, blocks]; `send_table` writes rows anew.
    """

    def __init__(
        self, platform: Platform, dispatcher: GraphDispatcher, num_rows: int, max_model_len: int, block_size: int
    ) -> None:
        self.dispatcher = dispatcher
        self.num_rows = num_rows + num_rows % 2  # what comes after them is aligned, too
        self.max_model_len = max_model_len
        self._platform = platform
        device = platform.device()
        largest = dispatcher.largest
        self.max_requests = min(largest, num_rows)
        self._num_bytes = -(-_spans(largest)[-1][1] // 16) * 16
        self.num_columns = -(-max_model_len // block_size)
        self.num_cells = self.max_requests * self.num_columns
        self._memory = torch.zeros(self.num_rows + self._num_bytes // 8, dtype=torch.int64, device=device)
        self.last_token = self._memory[: self.num_rows]  # before `known`, so that both are one source
        self._filled = self._memory[self.num_rows :].view(torch.uint8)
        self._targets: dict[int, torch.Tensor] = {}
        self._ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._cells = torch.zeros(self.num_cells + 1, dtype=torch.int32, device=device)  # the last one is no one's
        self.block_table = self._cells[: self.num_cells].view(self.max_requests, self.num_columns)
        self.one_token_each = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._on_device: dict[int, DeviceInputs] = {}
        self._decodes: dict[tuple[int, int], Views] = {}
        self._buffers: deque[_HostBuffer] = deque()
        self._buffer: _HostBuffer | None = None

    def on_device(self, size: int) -> DeviceInputs:
        found = self._on_device.get(size)
        if found is None:
            spans = list(zip(_spans(size), _IS_LONG, strict=True))[1:]
            fields = [self._filled[a:b].view(torch.int64 if is_long else torch.int32) for (a, b), is_long in spans]
            found = self._on_device[size] = DeviceInputs(self._ids[:size], *fields)
        return found

    def decodes(self, size: int, count: int) -> Views:
        """For `count` requests of one token each, padded to `size`."""
        found = self._decodes.get((size, count))
        if found is None:
            d = self.on_device(size)
            found = self._decodes[size, count] = Views(
                d.ids[:count],
                d.positions[:count],
                d.slots[:count],
                d.logits_indices[:count],
                d.sampling_rows[:count],
                d.seq_lens[:count],
                self.one_token_each[: count + 1],
                self.block_table[:count],
            )
        return found

    def begin(self, size: int) -> HostInputs:
        """Arrays that nobody reads. Waits for nothing: with all buffers under way there will be one more."""
        if self._buffers and self._buffers[0].fence.is_passed():
            buffer = self._buffers.popleft()
        else:
            buffer = _HostBuffer(self._platform, self._num_bytes)
        self._buffer = buffer
        return buffer.fields(size)

    def send(self, size: int) -> None:
        """Start the copy of what was written since `begin`."""
        buffer = self._buffer
        assert buffer is not None, "begin comes first"
        self._buffer = None
        target = self._targets.get(size)
        if target is None:
            target = self._targets[size] = self._filled[: _spans(size)[-1][1]]
        target.copy_(buffer.bytes_of(size), non_blocking=True)
        buffer.fence.record()
        self._buffers.append(buffer)

    def send_table(self, block_table: np.ndarray, rows: np.ndarray, num_columns: int) -> None:
        """Make the first rows those of a host's table, as far as their columns are used."""
        num_bytes = 4 * len(rows) * num_columns
        if not num_bytes:
            return
        # Torch's allocator keeps the buffer until it was read.
        staged = self._platform.host_buffer(num_bytes).view(torch.int32).view(len(rows), num_columns)
        staged.numpy()[...] = block_table[rows, :num_columns]
        self.block_table[: len(rows), :num_columns].copy_(staged, non_blocking=True)

    def blank(self, size: int) -> None:
        """Padding only, as for a capture."""
        host = self.begin(size)
        for field in host:
            field.fill(0)
        host.slots.fill(-1)
        host.table_at.fill(self.num_cells)
        self.send(size)

    def resolve(self, size: int) -> None:
        """Change the block table's cells and put the tokens' values together, on the device."""
        d = self.on_device(size)
        self._cells.index_copy_(0, d.table_at, d.table_to)
        torch.index_select(self._memory[: self.num_rows + size], 0, d.source, out=d.ids)


class _HostBuffer:
    """One step's inputs on their way; views are made once a size."""

    def __init__(self, platform: Platform, num_bytes: int) -> None:
        self.fence: Fence = platform.make_fence()
        self._bytes = platform.host_buffer(num_bytes)
        self._views: dict[int, tuple[HostInputs, torch.Tensor]] = {}

    def fields(self, size: int) -> HostInputs:
        return self._of(size)[0]

    def bytes_of(self, size: int) -> torch.Tensor:
        return self._of(size)[1]

    def _of(self, size: int) -> tuple[HostInputs, torch.Tensor]:
        found = self._views.get(size)
        if found is None:
            used = self._bytes[: _spans(size)[-1][1]]
            flat, spans = used.numpy(), zip(_spans(size), _IS_LONG, strict=True)
            views = [flat[a:b].view(np.int64 if is_long else np.int32) for (a, b), is_long in spans]
            found = self._views[size] = (HostInputs(*views), used)
        return found
