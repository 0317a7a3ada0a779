"""Writing keys and values into the paged cache."""

import torch

from atom.kernels.torch.quant import scale_rows


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write key and value [T, Hk, D] to slots (block * block_size + offset; negative = skip).

    Caches: [num_blocks, block_size, Hk, D]. With scales (float32 [num_blocks, block_size, Hk]) the
    cache is float8: each token and head is divided by its own amax / float8 max before rounding.
    """
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    for source, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        if scale is not None:
            source, per_head = scale_rows(source, cache.dtype)
            scale.view(-1, scale.shape[-1])[slot_mapping] = per_head
            # index_put has no float8 kernel; the bytes are what is stored anyway.
            source, cache = source.view(torch.uint8), cache.view(torch.uint8)
        cache.view(-1, *cache.shape[2:])[slot_mapping] = source.to(cache.dtype)
