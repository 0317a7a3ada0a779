"""Dense layers whose weights and rows are in eight bits.

Rows are as `quantize` gives them. A weight has scales of its own for each row, in groups of the same columns:
weight_scales, float32 [N, groups]. What a checkpoint shares among more of the weight is repeated.
"""

import torch
import torch.nn.functional as F


def prepare_quant_weight(
    weight: torch.Tensor, weight_scales: torch.Tensor, group_size: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[N, K] -> what the backend's `quant_linear` reads, beside the same scales; dtype: of its results."""
    return weight


def quant_linear(
    values: torch.Tensor,
    scales: torch.Tensor,
    prepared: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[T, K] and its scales [T, groups] -> dtype [T, out_features], multiplied and summed in float32."""
    x = dequantize(values, scales, group_size)
    weight = dequantize(prepared, weight_scales, group_size)
    return F.linear(x, weight, None if bias is None else bias.float()).to(dtype)


def dequantize(values: torch.Tensor, scales: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """[R, C], scales [R, groups] -> float32 [R, C]"""
    if group_size is None:
        return values.float() * scales
    whole = values.shape[1] // group_size  # the short group apart, as in `quantize`
    wide = values[:, : whole * group_size].float().unflatten(1, (-1, group_size)) * scales[:, :whole].unsqueeze(-1)
    if whole == scales.shape[1]:
        return wide.flatten(1)
    return torch.cat([wide.flatten(1), values[:, whole * group_size :].float() * scales[:, whole:]], 1)
