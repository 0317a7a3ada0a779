"""Dense layers. `prepare_*` turns a checkpoint weight into what the backend's kernel reads."""

import torch
import torch.nn.functional as F

from atom.kernels.torch.activation import silu_and_mul
from atom.kernels.torch.norm import add_rms_norm, rms_norm
from atom.kernels.torch.sampling import greedy


def prepare_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> the backend's own layout, opaque to callers; any shape, may alias the input."""
    return weight


def linear(
    x: torch.Tensor, prepared: torch.Tensor, bias: torch.Tensor | None, out_features: int, out_float32: bool = False
) -> torch.Tensor:
    """[..., K] -> [..., out_features], accumulated in float32; x's dtype, or float32 (for logits)."""
    out = F.linear(x, prepared, bias)
    return out.float() if out_float32 else out


def linear_argmax(x: torch.Tensor, prepared: torch.Tensor, out_features: int) -> torch.Tensor:
    """[R, K] -> int64 [R]: the first of the largest of each row's float32 outputs (or the first NaN)."""
    return greedy(linear(x, prepared, None, out_features, out_float32=True))


def prepare_silu_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """Like prepare_linear_weight for a merged gate-and-up weight [2 * I, K]."""
    return weight


def linear_silu_and_mul(x: torch.Tensor, prepared: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """[T, K] -> [T, I]: silu(x @ gate.T) * (x @ up.T)."""
    return silu_and_mul(F.linear(x, prepared))


def rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    prepared: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """`linear` of rms_norm(x), or of rms_norm(x + residual), where the residual becomes that sum."""
    return linear(_normalized(x, residual, norm_weight, eps), prepared, bias, out_features)


def rms_norm_linear_silu_and_mul(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    prepared: torch.Tensor,
    intermediate_size: int,
) -> torch.Tensor:
    """`linear_silu_and_mul` of the same."""
    return linear_silu_and_mul(_normalized(x, residual, norm_weight, eps), prepared, intermediate_size)


def _normalized(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if residual is None:
        return rms_norm(x, weight, eps)
    y, total = add_rms_norm(x, residual, weight, eps)
    residual.copy_(total)
    return y
