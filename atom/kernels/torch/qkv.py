"""From the packed projection to a query that is ready for attention and a cache that holds the new keys and values."""

from collections.abc import Callable
from typing import Any

import torch

from atom.kernels.torch.kv_cache import store_kv
from atom.kernels.torch.norm import rms_norm
from atom.kernels.torch.rotary import rotary_embedding_

Op = Callable[..., Any]


def qk_norm_rope_cache_of(rms_norm: Op, rotary_embedding_: Op, store_kv: Op) -> Op:
    """The op that is made of these three ops of a backend."""

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
        """Normalize and rotate the heads of query and key, write the query, and store key and value in the cache.

        qkv: [T, Hq + 2 * Hk, D], not changed; query: [T, Hq, D], written; q_weight, k_weight: [D], both None
        without normalization; the rest as in `rotary_embedding_` and `store_kv`. Rows of a negative slot get
        their query, and nothing is stored for them.
        """
        num_kv_heads = k_cache.shape[2]
        q, k, v = qkv.split_with_sizes([query.shape[1], num_kv_heads, num_kv_heads], 1)
        query.copy_(q if q_weight is None else rms_norm(q, q_weight, eps))
        k = k.clone() if k_weight is None else rms_norm(k, k_weight, eps)
        rotary_embedding_(positions, query, k, cos_sin_cache, interleaved)
        store_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)

    return qk_norm_rope_cache


qk_norm_rope_cache = qk_norm_rope_cache_of(rms_norm, rotary_embedding_, store_kv)
