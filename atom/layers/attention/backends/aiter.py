"""AITER's kernels, for AMD Instinct GPUs."""

import torch

from atom.kernels import unavailable_reason
from atom.kernels.aiter import attention as kernels
from atom.layers.attention.backends.paged import PagedAttentionBackend, vendor_dtype_reasons
from atom.layers.attention.base import AttentionMetadata, AttentionSpec, KVCache

_BLOCK_SIZE = 16  # the only one that both kernels take
_HEAD_DIM = 128
_ARCHITECTURES = ("gfx942", "gfx950")


class AiterAttentionBackend(PagedAttentionBackend):
    """Paged attention for decodes, which alone are captured whole, and batch prefill for the rest."""

    name = "aiter"
    kernel_backends = ("triton", "torch")  # write the cache
    captures_mixed = False

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._one = torch.ones(1, dtype=torch.float32)

    @classmethod
    def unsupported_reasons(cls, spec: AttentionSpec, device_type: str) -> list[str]:
        reasons = []
        if device_type != "cuda":
            reasons.append(f"it runs on an AMD GPU, not on a {device_type.upper()}")
        elif torch.version.hip is not None and torch.cuda.is_available():
            reasons += machine_reasons(torch.cuda.get_device_properties().gcnArchName, torch.version.hip)
        reasons += vendor_dtype_reasons(spec)
        if spec.block_size != _BLOCK_SIZE:
            reasons.append(f"kv_cache_block_size={spec.block_size} is not {_BLOCK_SIZE}")
        if spec.head_dim != _HEAD_DIM:
            reasons.append(f"head_dim={spec.head_dim} is not {_HEAD_DIM}")
        if spec.num_heads // spec.num_kv_heads > 16:
            reasons.append(f"{spec.num_heads // spec.num_kv_heads} query heads a key head are over 16")
        reason = unavailable_reason("aiter")
        return reasons if reason is None else [*reasons, reason]

    def _attend_cache(
        self, query: torch.Tensor, cache: KVCache, metadata: AttentionMetadata, output: torch.Tensor
    ) -> None:
        spec, count = self.spec, metadata.num_decodes
        if count:
            kernels.decode(
                query[:count],
                cache.k,
                cache.v,
                metadata.seq_lens[:count],
                metadata.block_table[:count],
                output[:count],
                spec.scale,
                metadata.max_seq_len,
                spec.sliding_window,
                self._one,
            )
        if count < metadata.seq_lens.shape[0]:
            kernels.prefill(
                query,
                cache.k,
                cache.v,
                metadata.query_start_loc[count:],
                metadata.seq_lens[count:],
                metadata.block_table[count:],
                output,
                spec.scale,
                metadata.max_query_len,
                metadata.max_seq_len,
                spec.sliding_window,
            )


def machine_reasons(architecture: str, rocm: str) -> list[str]:
    """Why AITER is not for a GPU with this ROCm; architecture: as torch calls it, "gfx942:sramecc+:xnack-"."""
    chip = architecture.split(":")[0]
    if chip not in _ARCHITECTURES:
        return [f"{chip} is not one of {', '.join(_ARCHITECTURES)}"]
    if chip == "gfx950" and rocm.startswith("7.2"):
        # AITER's own tests leave this out: the compiler makes a wrong kernel for causal attention.
        return [f"ROCm {rocm} compiles its prompt kernel wrongly for {chip}; another ROCm is needed"]
    return []
