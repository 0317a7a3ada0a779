"""From the packed projection to attention's query and the cache, with the C++ kernels: they alone know the cache."""

import torch

from atom.kernels.cpu.kv_cache import store_kv
from atom.kernels.cpu.norm import rms_norm
from atom.kernels.cpu.rotary import rotary_embedding_


def qk_norm_rope_cache(
    qkv: torch.Tensor,
    query: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """As the reference."""
    num_kv_heads = k_cache.shape[2]
    q, k, v = qkv.split_with_sizes([query.shape[1], num_kv_heads, num_kv_heads], 1)
    query.copy_(q if q_weight is None else rms_norm(q, q_weight, eps))
    k = k.clone() if k_weight is None else rms_norm(k, k_weight, eps)
    rotary_embedding_(positions, query, k, cos_sin_cache, interleaved)
    store_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
