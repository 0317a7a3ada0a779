"""FlashInfer's kernels, for NVIDIA GPUs. They run a plan that the host makes once a step for all layers of a kind."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from atom.kernels import unavailable_reason
from atom.kernels.flashinfer import attention as kernels
from atom.layers.attention.backends.paged import PagedAttentionBackend, vendor_dtype_reasons
from atom.layers.attention.base import AttentionMetadata, AttentionSpec, KVCache, StepPlanner

_HEAD_DIMS = (64, 128, 256)  # of which both its FlashAttention-2 and its FlashAttention-3 kernels exist
_GRAPH_REQUESTS = 512  # room is reserved for, before memory is measured; larger graphs take more
_GRAPH_INTEGERS = 1 << 20  # bytes of a graph's plan: some 30 a request and a split


class FlashInferAttentionBackend(PagedAttentionBackend):
    """Only batches of decodes are captured whole: plans of mixed ones differ in more than their contents."""

    name = "flashinfer"
    kernel_backends = ("triton", "torch")  # write the cache
    captures_mixed = False
    planner: "FlashInferPlanner | None"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        device = torch.get_default_device()
        if device.type == "cuda":  # now, so that the cache is sized to what is left
            reserve(spec, device, _GRAPH_REQUESTS)

    @classmethod
    def unsupported_reasons(cls, spec: AttentionSpec, device_type: str) -> list[str]:
        reasons = []
        if device_type != "cuda":
            reasons.append(f"it runs on an NVIDIA GPU, not on a {device_type.upper()}")
        elif torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            reasons.append("it needs compute capability 8.0 or newer")
        reasons += vendor_dtype_reasons(spec)
        if spec.head_dim not in _HEAD_DIMS:
            reasons.append(f"head_dim={spec.head_dim} is not one of {', '.join(map(str, _HEAD_DIMS))}")
        reason = unavailable_reason("flashinfer")
        return reasons if reason is None else [*reasons, reason]

    def make_planner(self) -> "FlashInferPlanner":
        return FlashInferPlanner(self.spec)

    def _attend_cache(
        self, query: torch.Tensor, cache: KVCache, metadata: AttentionMetadata, output: torch.Tensor
    ) -> None:
        assert self.planner is not None, "steps are planned before layers run"
        for part in self.planner.parts:
            part.plan.wrapper.run(query[part.tokens], (cache.k, cache.v), out=output[part.tokens])


class Pages(NamedTuple):
    """Which blocks requests have, in FlashInfer's terms: int32 [R + 1], offsets into a flat list; int32 [R]."""

    indptr: np.ndarray
    last_page_len: np.ndarray


def count_pages(seq_lens: np.ndarray, block_size: int, size: int) -> Pages:
    """Pages of requests that are padded to `size` of them.

    Padding, and requests of length 0, see one token of some block: kernels and planners never meet an empty request,
    and what comes out is void anyhow.
    """
    lengths = np.ones(size, dtype=np.int64)
    np.maximum(seq_lens, 1, out=lengths[: len(seq_lens)])
    counts = -(-lengths // block_size)
    indptr = np.zeros(size + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    return Pages(indptr, (lengths - (counts - 1) * block_size).astype(np.int32))


def list_pages(
    block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int, total: int, padding: int
) -> torch.Tensor:
    """int32 [total + padding]: all requests' blocks in a row, made on the device, as they are many; padding is block 0.

    total: of `count_pages`, so that nothing is read from the device.
    """
    counts = ((seq_lens + (block_size - 1)) // block_size).clamp_(min=1)
    rows = torch.repeat_interleave(counts, output_size=total)
    columns = torch.arange(total, device=rows.device) - (counts.cumsum(0) - counts)[rows]
    return torch.nn.functional.pad(block_table[rows, columns], (0, padding))


@dataclass(slots=True)
class Plan:
    """A wrapper, and when its last plan had left the host's buffer, which it reuses."""

    wrapper: Any
    copied: torch.cuda.Event | None = None

    def make(self, device: torch.device, *args: Any, **kwargs: Any) -> None:
        if self.copied is not None and not self.copied.query():  # with two steps in flight it long is
            self.copied.synchronize()
        self.wrapper.plan(*args, **kwargs)
        if device.type == "cuda":
            self.copied = self.copied or torch.cuda.Event()
            self.copied.record()


class Part(NamedTuple):
    plan: Plan
    tokens: slice


class FlashInferPlanner(StepPlanner):
    """parts: what runs in each layer of the step that was planned last, its decodes and its prompts."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.parts: list[Part] = []
        self._decode: Plan | None = None
        self._prefill: Plan | None = None
        self._graphs: dict[int, Plan] = {}
        self._graph_integers: torch.Tensor | None = None
        self._settings = {
            "sm_scale": spec.scale,
            "window_left": spec.sliding_window - 1,  # it counts the tokens before; -1: no window
            "q_data_type": spec.dtype,
            "kv_data_type": spec.kv_cache_dtype,
        }

    def plan(self, metadata: AttentionMetadata, graph_size: int = 0) -> None:
        spec, device = self.spec, metadata.block_table.device
        if metadata.on_host is not None:
            starts, seq_lens = metadata.on_host
        else:  # of a capture, which may wait for the device
            starts, seq_lens = (t.cpu().numpy() for t in (metadata.query_start_loc, metadata.seq_lens))
        num_requests, num_decodes = len(seq_lens), metadata.num_decodes
        assert not graph_size or num_decodes == num_requests, "mixed batches aren't captured"
        indptr, last_page_len = count_pages(seq_lens, spec.block_size, graph_size or num_requests)
        padding = max(0, graph_size - num_requests)
        total = int(indptr[num_requests])
        indices = list_pages(metadata.block_table, metadata.seq_lens, spec.block_size, total, padding)
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size)
        self.parts = []
        if num_decodes:
            count = graph_size or num_decodes
            if graph_size:
                plan = self._graph(graph_size, metadata.block_table)
            else:
                plan = self._decode = self._decode or Plan(kernels.make_decode(reserve(spec, device, 0)))
            plan.make(
                device,
                _pinned(indptr[: count + 1], device),
                indices[: indptr[count]],
                _pinned(last_page_len[:count], device),
                *shape,
                **self._settings,
            )
            self.parts.append(Part(plan, slice(0, count)))
        if num_decodes < num_requests:
            plan = self._prefill = self._prefill or Plan(kernels.make_prefill(reserve(spec, device, 0)))
            plan.make(
                device,
                _pinned(starts[num_decodes:] - starts[num_decodes], device),
                _pinned(indptr[num_decodes:] - indptr[num_decodes], device),
                indices[indptr[num_decodes] :],
                _pinned(last_page_len[num_decodes:], device),
                *shape,
                causal=True,
                **self._settings,
            )
            self.parts.append(Part(plan, slice(num_decodes, int(starts[-1]))))

    def _graph(self, size: int, block_table: torch.Tensor) -> Plan:
        """Made at the capture, whose block table has room for all that will come."""
        if size not in self._graphs:
            device = block_table.device
            if self._graph_integers is None:
                self._graph_integers = torch.empty(_GRAPH_INTEGERS, dtype=torch.uint8, device=device)
            room = reserve(self.spec, device, size)
            wrapper = kernels.make_graph_decode(room, self._graph_integers, size, block_table.numel())
            self._graphs[size] = Plan(wrapper)
        return self._graphs[size]


def reserve(spec: AttentionSpec, device: torch.device, num_decodes: int) -> torch.Tensor:
    """The device's workspace, grown to what the spec's layers need."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    needed = kernels.workspace_bytes(spec.num_heads, spec.num_kv_heads, spec.head_dim, num_sms, num_decodes)
    return kernels.workspace(device, needed)


def _pinned(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host tensor that copies to the device without waiting; a new one, as an earlier one may still be read."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor
