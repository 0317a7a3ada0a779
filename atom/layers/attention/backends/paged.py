"""What the backends built on our own paged_attention op have in common: store, then attend."""

from typing import ClassVar

import torch

from atom.kernels import get_op
from atom.layers.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, KVCache, PackedRotation


class PagedAttentionBackend(AttentionBackend):
    """kernel_backends: where the ops come from, best first."""

    kernel_backends: ClassVar[tuple[str, ...]]

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._prepare = get_op("qk_norm_rope_cache", self.kernel_backends)
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
        self._attend_cache(query, cache, metadata, output)

    def forward_packed(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotation: PackedRotation,
        cache: KVCache,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        query = self._prepare_packed(qkv, positions, rotation, cache, metadata, output)
        self._attend_cache(query, cache, metadata, output)

    def _prepare_packed(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotation: PackedRotation,
        cache: KVCache,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """The query as attention wants it, shaped like output; its keys and values are in the cache."""
        query = torch.empty_like(output)
        self._prepare(
            qkv,
            query,
            positions,
            rotation.cos_sin_cache,
            rotation.q_weight,
            rotation.k_weight,
            rotation.eps,
            cache.k,
            cache.v,
            metadata.slot_mapping,
            cache.k_scale,
            cache.v_scale,
            rotation.interleaved,
        )
        return query

    def _attend_cache(
        self, query: torch.Tensor, cache: KVCache, metadata: AttentionMetadata, output: torch.Tensor
    ) -> None:
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


def vendor_dtype_reasons(spec: AttentionSpec) -> list[str]:
    """Why the types of a spec are none that the vendors' packages have kernels for."""
    dtype, cache_dtype = (str(d).removeprefix("torch.") for d in (spec.dtype, spec.kv_cache_dtype))
    reasons = []
    if spec.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"it computes in bfloat16 or float16, not in {dtype}")
    if spec.kv_cache_dtype != spec.dtype:
        reasons.append(f"its {cache_dtype} caches have one scale, ATOM's one a token and head")
    return reasons
