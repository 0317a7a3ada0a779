"""RMSNorm in C++."""

import torch
from torch.compiler import is_compiling

from atom.kernels.cpu.ops import fast, ops
from atom.kernels.torch import norm as reference

_rms_norm, _add_rms_norm = fast.rms_norm, fast.add_rms_norm
_op_rms_norm, _op_add_rms_norm = ops.rms_norm.default, ops.add_rms_norm.default


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference."""
    if is_compiling():
        return _op_rms_norm(x, weight, eps)
    out = _rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps) if out is NotImplemented else out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; writes the results over x and residual."""
    if is_compiling():
        return _op_add_rms_norm(x, residual, weight, eps)
    out = _add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps) if out is NotImplemented else out
