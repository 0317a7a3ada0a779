"""Writing keys and values into the paged cache."""

import torch


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
            source, per_head = quantize_per_head(source, cache.dtype)
            scale.view(-1, scale.shape[-1])[slot_mapping] = per_head
            # index_put has no float8 kernel; the bytes are what is stored anyway.
            source, cache = source.view(torch.uint8), cache.view(torch.uint8)
        cache.view(-1, *cache.shape[2:])[slot_mapping] = source.to(cache.dtype)


def quantize_per_head(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H, D] -> (float8 [T, H, D], float32 scale [T, H]); x is about float8 * scale."""
    top = torch.finfo(dtype).max
    # By a tensor: dividing by a number, CUDA multiplies by its inverse, which rounds otherwise.
    scale = x.float().abs().amax(-1).clamp(min=1e-10) / torch.full((), top, device=x.device)
    return (x.float() / scale.unsqueeze(-1)).clamp(-top, top).to(dtype), scale
