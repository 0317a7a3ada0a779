"""What an attention backend is: its cache layout, what it supports, and its forward."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from atom.layers.attention.long_prompts import LongPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Everything about a layer's attention that does not change between steps."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    block_size: int
    kv_cache_dtype: torch.dtype  # == dtype, or a float8 type with scales
    sliding_window: int = 0  # 0 = sees all earlier tokens


class LongPart(NamedTuple):
    """`length` tokens of one request, from the batch's token `start` on, that long prompts' own kernel may take.

    request: its row of the block table; context: how many of the request's tokens come before, all in the cache.
    """

    request: int
    start: int
    length: int
    context: int


class OnHost(NamedTuple):
    """What metadata holds on the device, for backends that plan a step on the host."""

    query_start_loc: np.ndarray  # int32 [R + 1]
    seq_lens: np.ndarray  # [R], of any integer type


@dataclass(slots=True, kw_only=True)
class AttentionMetadata:
    """How one step's flat tokens map to requests and to the paged cache.

    Requests with one query token (decodes) come first. Query token i of request r has
    position seq_lens[r] - query_len[r] + i and sees the keys at positions <= its own.

    query_start_loc: int32 [R + 1], first token of each request in the flat batch
    seq_lens:        int32 [R], tokens of the request in the cache after this step
    block_table:     int32 [R, max_blocks], cache blocks in order
    slot_mapping:    int64 [T], block * block_size + offset; -1 = padding, not stored
    long_parts:      see `AttentionBackend.long_prompts`; always empty where a graph is captured
    rest:            the step without its long parts, None if nothing is left. It ends with the last token of no long
                     part; in its middle, long parts are requests of length 0: what is written for them is void.
    on_host:         None where nobody had it on the host, as in a capture
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    long_parts: tuple[LongPart, ...] = ()
    rest: "AttentionMetadata | None" = None
    on_host: OnHost | None = None


@dataclass(slots=True)
class KVCache:
    """One layer's cache: [num_blocks, block_size, num_kv_heads, head_dim] each.

    Scales are float32 [num_blocks, block_size, num_kv_heads], present only with a float8 cache.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRotation:
    """What `forward_packed` does to query and key heads before attention.

    cos_sin_cache: float32 [max_position, rotary_dim]; q_weight, k_weight: [D] of RMSNorms, or both None.
    """

    cos_sin_cache: torch.Tensor
    interleaved: bool
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float


class StepPlanner(ABC):
    """Work on the host that is the same for all layers with one backend and spec: done once a step, before they run."""

    @abstractmethod
    def plan(self, metadata: AttentionMetadata, graph_size: int = 0) -> None:
        """Make the step's layers find their plan; never waits for the device, but before a capture.

        graph_size: of the graph of a decode batch that is replayed, or captured, next, in requests; the metadata's own
        may be fewer. What the graph reads then is filled in place. 0: layers run as they are.
        """


class AttentionBackend(ABC):
    """Stateless but for its spec; one instance a layer. One file a backend."""

    name: str
    can_be_captured: bool = True  # in a CUDA graph: forward never waits for the device
    captures_mixed: bool = True  # also with prompts in the batch, not only decodes
    planner: StepPlanner | None = None  # shared by layers; from make_planner, set by what runs steps
    long_prompts: "LongPrompts | None" = None  # how steps are cut for a backend that reads metadata.long_parts

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    def make_planner(self) -> StepPlanner | None:
        """A planner for all layers with this backend and spec; None if there is nothing to plan."""
        return None

    @classmethod
    @abstractmethod
    def unsupported_reasons(cls, spec: AttentionSpec, device_type: str) -> list[str]:
        """Why this backend can't serve the spec on the device; empty when it can."""

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """Store key and value at the slots, then attend.

        query, output: [T, num_heads, head_dim]; key, value: [T, num_kv_heads, head_dim].
        """

    @abstractmethod
    def forward_packed(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotation: PackedRotation,
        cache: KVCache,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """Normalize and rotate query and key, store key and value, then attend.

        qkv: [T, num_heads + 2 * num_kv_heads, head_dim], not changed; positions: int64 [T].
        """
