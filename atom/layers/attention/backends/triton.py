"""The Triton kernels, for NVIDIA and AMD GPUs."""

from collections.abc import Callable

import torch

from atom.kernels import unavailable_reason
from atom.layers.attention.backends.paged import PagedAttentionBackend
from atom.layers.attention.base import AttentionMetadata, AttentionSpec, KVCache, PackedRotation
from atom.layers.attention.long_prompts import LongPrompts


class TritonAttentionBackend(PagedAttentionBackend):
    """Long prompts go to torch's attention where that is cuDNN's, which is faster than ours: see `long_prompts`."""

    name = "triton"
    kernel_backends = ("triton",)

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        if _has_fast_torch_attention(spec):
            self.long_prompts = LongPrompts()

    @classmethod
    def unsupported_reasons(cls, spec: AttentionSpec, device_type: str) -> list[str]:
        reasons = []
        if device_type == "cpu":
            reasons.append("it runs on a GPU, not on a CPU")
        if spec.head_dim > 256:
            reasons.append(f"head_dim={spec.head_dim} is over 256")
        reason = unavailable_reason("triton")
        return reasons if reason is None else [*reasons, reason]

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
        self._attend_all(query, lambda part: (key[part], value[part]), cache, metadata, output)

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
        num_kv_heads = cache.k.shape[2]

        def keys_and_values(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            rotated = cache.k.flatten(0, 1).index_select(0, metadata.slot_mapping[part])
            return rotated, qkv[part, -num_kv_heads:]

        self._attend_all(query, keys_and_values, cache, metadata, output)

    def _attend_all(
        self,
        query: torch.Tensor,
        keys_and_values: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
        cache: KVCache,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """keys_and_values: of a range of this step's tokens, [T, Hk, D] each."""
        if self.long_prompts is None or not metadata.long_parts:
            self._attend_cache(query, cache, metadata, output)
            return
        if (rest := metadata.rest) is not None:
            num_tokens = rest.slot_mapping.shape[0]
            self._attend_cache(query[:num_tokens], cache, rest, output[:num_tokens])
        for part in metadata.long_parts:  # after the rest, which may write to their rows
            rows = slice(part.start, part.start + part.length)
            key, value = keys_and_values(rows)
            output[rows] = self.long_prompts.attend(
                part, query[rows], key, value, cache, metadata.block_table, self.spec.scale
            )


def _has_fast_torch_attention(spec: AttentionSpec) -> bool:
    return (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (9, 0)
        and torch.backends.cudnn.is_available()
        and spec.dtype in (torch.bfloat16, torch.float16)
        and spec.kv_cache_dtype == spec.dtype  # else the cache's rounded keys are what later tokens see, too
        and spec.head_dim <= 128
        and spec.head_dim % 8 == 0
        and not spec.sliding_window
    )
