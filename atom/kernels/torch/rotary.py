"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

import torch


def rotary_embedding_(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """Rotate query [T, Hq, D] and key [T, Hk, D] in place; both may be strided views of one tensor.

    positions: int64 [T]; cos_sin_cache: float32 [max_position, rotary_dim], cosines then sines.
    The first rotary_dim of D are rotated: halves against each other (NeoX), or neighbours if
    `interleaved` (GPT-J).
    """
    cos, sin = cos_sin_cache[positions].chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1).to(query.dtype), sin.unsqueeze(1).to(query.dtype)
    rotary_dim = cos_sin_cache.shape[-1]
    for x in (query, key):
        part = x[..., :rotary_dim]
        if interleaved:
            a, b = part[..., ::2], part[..., 1::2]
        else:
            a, b = part.chunk(2, dim=-1)
        rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
        a.copy_(rotated_a)
        b.copy_(rotated_b)
