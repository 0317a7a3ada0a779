"""Dense layers in C++ over packed weights.

A packed weight is [panels, K steps, 16 columns, values a step], in the weight's dtype and padded with zeros. A weight
that the kernels can't take (float64, say) stays as it is, and the reference computes with it.
"""

import torch
from torch.compiler import is_compiling

from atom.kernels.cpu.ops import fast, ops
from atom.kernels.torch import linear as reference

_pack_weight, _linear, _linear_silu_and_mul = fast.pack_weight, fast.linear, fast.linear_silu_and_mul
_linear_argmax, _norm_linear = fast.linear_argmax, fast.norm_linear
_op_linear, _op_linear_silu_and_mul = ops.linear.default, ops.linear_silu_and_mul.default


def prepare_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> packed copy."""
    packed = _pack_weight(weight.detach(), False)
    return weight if packed is NotImplemented else packed


def linear(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_features: int, out_float32: bool = False
) -> torch.Tensor:
    """As the reference; float32 results are not rounded to x's dtype first. A row's bits depend on that row only."""
    if is_compiling():
        return _op_linear(x, prepared, bias, out_features, out_float32)
    out = _linear(x, prepared, bias, out_features, out_float32)
    if out is NotImplemented:
        assert prepared.dim() == 2, f"no kernel for x of {x.dtype} with a packed weight and bias {bias}"
        return reference.linear(x, prepared, bias, out_features, out_float32)
    return out


def linear_argmax(x: torch.Tensor, prepared: torch.Tensor, out_features: int) -> torch.Tensor:
    """As the reference, of float32 results that are not rounded and not kept."""
    out = _linear_argmax(x, prepared, out_features)
    return reference.linear_argmax(x, prepared, out_features) if out is NotImplemented else out


def prepare_silu_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """[2 * I, K], gate above up -> packed copy whose panels alternate between the two."""
    packed = _pack_weight(weight.detach(), True)
    return weight if packed is NotImplemented else packed


def linear_silu_and_mul(x: torch.Tensor, prepared: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """As the reference, rounded once."""
    if is_compiling():
        return _op_linear_silu_and_mul(x, prepared, intermediate_size)
    out = _linear_silu_and_mul(x, prepared, intermediate_size)
    if out is NotImplemented:
        assert prepared.dim() == 2, f"no kernel for x of {x.dtype} with a packed weight"
        return reference.linear_silu_and_mul(x, prepared, intermediate_size)
    return out


def rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    prepared: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """As the reference; the bits of rms_norm and linear. Not for torch.compile, which sees these two instead."""
    out = _norm_linear(x, residual, norm_weight, eps, prepared, bias, out_features, False)
    if out is NotImplemented:
        assert prepared.dim() == 2, f"no kernel for x of {x.dtype} with a packed weight and bias {bias}"
        return reference.rms_norm_linear(x, residual, norm_weight, eps, prepared, bias, out_features)
    return out


def rms_norm_linear_silu_and_mul(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    prepared: torch.Tensor,
    intermediate_size: int,
) -> torch.Tensor:
    """As the reference; the bits of rms_norm and linear_silu_and_mul. Not for torch.compile either."""
    out = _norm_linear(x, residual, norm_weight, eps, prepared, None, intermediate_size, True)
    if out is NotImplemented:
        assert prepared.dim() == 2, f"no kernel for x of {x.dtype} with a packed weight"
        return reference.rms_norm_linear_silu_and_mul(x, residual, norm_weight, eps, prepared, intermediate_size)
    return out
