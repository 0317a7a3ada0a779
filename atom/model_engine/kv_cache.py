"""How much memory the KV cache gets, and its tensors."""

import contextlib
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from atom.config import KVCacheConfig, KVCacheTensor
from atom.layers.attention.base import AttentionSpec, KVCache
from atom.layers.attention.layer import Attention
from atom.utils.errors import CacheMemoryError


def needs_scale(spec: AttentionSpec) -> bool:
    """float8 caches keep a float32 scale per token and KV head; others none."""
    return spec.kv_cache_dtype.itemsize == 1


def bytes_per_block(specs: Iterable[AttentionSpec]) -> int:
    """Bytes that one block takes over all layers, keys and values and their scales."""
    total = 0
    for spec in specs:
        per_head = spec.head_dim * spec.kv_cache_dtype.itemsize + (4 if needs_scale(spec) else 0)
        total += 2 * spec.block_size * spec.num_kv_heads * per_head
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory goes, in bytes; printed by `atom config`."""

    num_blocks: int
    block_size: int
    bytes_per_block: int
    total_bytes: int
    free_bytes: int  # before the cache is allocated, after weights and the profiling run
    weight_bytes: int
    activation_bytes: int  # peak of the profiling run; 0 = not measured on this platform
    reason: str  # why num_blocks is what it is

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def num_cached_tokens(self) -> int:
        return self.num_blocks * self.block_size


def useful_blocks(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """More blocks than this could never be in use at once."""
    return max_num_seqs * -(-max_model_len // block_size)


def require_blocks(available_bytes: int, block_bytes: int, needed: int, setting: str) -> int:
    """Blocks that fit into available_bytes; CacheMemoryError when fewer than `needed` do."""
    blocks = max(0, available_bytes) // block_bytes
    if blocks < needed:
        missing = needed * block_bytes - available_bytes
        raise CacheMemoryError(
            f"no memory for the KV cache: {needed} blocks of {block_bytes / 2**20:.2f} MiB are needed but "
            f"{max(0, available_bytes) / 2**20:.1f} MiB are available, {missing / 2**20:.1f} MiB too few; "
            f"raise {setting}, lower max_model_len or max_num_batched_tokens, or use kv_cache_dtype='fp8'"
        )
    return blocks


def allocate(layers: list[Attention], num_blocks: int, device: torch.device) -> KVCacheConfig:
    """Create each layer's cache and give it to the layer; zeros, so that no NaN can lie in wait."""
    tensors = []
    for index, layer in enumerate(layers):
        spec = layer.spec
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        scales: list[torch.Tensor | None] = [None, None]
        if needs_scale(spec):
            scales = [_zeros(shape[:-1], torch.float32, device) for _ in range(2)]
        k, v = (_zeros(shape, spec.kv_cache_dtype, device) for _ in range(2))
        layer.kv_cache = KVCache(k, v, scales[0], scales[1])
        tensors.append(KVCacheTensor(layer_num=index, k_cache=k, v_cache=v, k_scale=scales[0], v_scale=scales[1]))
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=tensors)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Zero pages straight from the system: they take memory, and time, only when written. They begin at a page, so that
    # no vector crosses cache lines, and are large where they may be.
    size = max(1, math.prod(shape) * dtype.itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)
