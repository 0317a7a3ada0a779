"""Rows in eight bits, from the C++ norms and activation; see `atom.kernels.torch.quant`."""

import torch

from atom.kernels.cpu.activation import silu_and_mul
from atom.kernels.cpu.norm import add_rms_norm, rms_norm
from atom.kernels.torch.quant import quantize


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(rms_norm(x, weight, eps), dtype, group_size)


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed, total = add_rms_norm(x, residual, weight, eps)
    return *quantize(normed, dtype, group_size), total


def silu_and_mul_quant(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(silu_and_mul(x), dtype, group_size)
