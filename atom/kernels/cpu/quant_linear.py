"""Dense layers of eight-bit checkpoints: the weight is widened when it is loaded, and multiplied as any other."""

import torch

from atom.kernels.cpu.linear import linear, prepare_linear_weight
from atom.kernels.torch.quant_linear import dequantize


def prepare_quant_weight(
    weight: torch.Tensor, weight_scales: torch.Tensor, group_size: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[N, K] -> packed in dtype, which takes as much memory as if it had never been quantized."""
    return prepare_linear_weight(dequantize(weight, weight_scales, group_size).to(dtype))


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
    """As the reference, with both operands rounded to dtype."""
    return linear(dequantize(values, scales, group_size).to(dtype), prepared, bias, out_features)
