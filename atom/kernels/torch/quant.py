"""Rows in eight bits: values of float8 or int8, and the float32 scales that they are to be multiplied by.

Scales are dynamic (from the rows themselves) and symmetric: scale = largest magnitude / largest value of the type.
Values are rounded to the nearest, ties to even, and never overflow. Rows must be finite; a row of zeros has a tiny
scale. In all ops here dtype is a float8 type or int8, and group_size says how many columns share a scale, None for a
whole row. The last group is shorter where group_size doesn't divide the columns.
"""

import torch

from atom.kernels.torch.activation import silu_and_mul
from atom.kernels.torch.norm import add_rms_norm, rms_norm


def quantize(x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, N] -> (dtype [T, N], float32 scales [T, groups]); groups = 1, or N / group_size rounded up."""
    if group_size is None:
        values, scales = scale_rows(x, dtype)
        return values, scales.unsqueeze(-1)
    # The short group apart: padded and cut again, Inductor (torch 2.13) computes something else on CPUs.
    whole = x.shape[1] // group_size * group_size
    values, scales = scale_rows(x[:, :whole].unflatten(1, (-1, group_size)), dtype)
    values = values.flatten(1)
    if whole == x.shape[1]:
        return values, scales
    rest, rest_scales = scale_rows(x[:, whole:], dtype)
    return torch.cat([values, rest], 1), torch.cat([scales, rest_scales.unsqueeze(-1)], 1)


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize` of `rms_norm`."""
    return quantize(rms_norm(x, weight, eps), dtype, group_size)


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, scales, x + residual): `quantize` of `add_rms_norm`. Backends may reuse both inputs' memory."""
    normed, total = add_rms_norm(x, residual, weight, eps)
    return *quantize(normed, dtype, group_size), total


def silu_and_mul_quant(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2 * I] -> (dtype [T, I], scales): `quantize` of `silu_and_mul`."""
    return quantize(silu_and_mul(x), dtype, group_size)


def scale_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., N] -> (dtype [..., N], float32 scale [...]); x is about values * scale."""
    top = largest(dtype)
    # By a tensor: dividing by a number, CUDA multiplies by its inverse, which rounds otherwise.
    scale = x.float().abs().amax(-1).clamp(min=1e-10) / torch.full((), top, device=x.device)
    values = (x.float() / scale.unsqueeze(-1)).clamp(-top, top)
    return (values if dtype.is_floating_point else values.round()).to(dtype), scale


def largest(dtype: torch.dtype) -> float:
    """The largest value of a type; int8's smallest stays unused, so that the range is symmetric."""
    return float((torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max)
