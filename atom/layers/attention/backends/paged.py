"""What the backends built on our own paged_attention op have in common: store, then attend."""

from typing import ClassVar

import torch

from atom.kernels import get_op
from atom.layers.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, KVCache


class PagedAttentionBackend(AttentionBackend):
    """kernel_backends: where the ops come from, best first."""

    kernel_backends: ClassVar[tuple[str, ...]]

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._store_kv = get_op("store_kv", self.kernel_backends)
        self._attend = get_op("paged_attention", self.kernel_backends)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        self._store_kv(key, value, cache.k, cache.v, metadata.slot_mapping, cache.k_scale, cache.v_scale)
        self._attend(
            query,
            cache.k,
            cache.v,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            output,
            self.spec.scale,
            metadata.num_decodes,
            metadata.max_query_len,
            metadata.max_seq_len,
            self.spec.sliding_window,
            cache.k_scale,
            cache.v_scale,
        )
