"""Gated activations in C++."""

import torch
from torch.compiler import is_compiling

from atom.kernels.cpu.ops import fast, ops
from atom.kernels.torch import activation as reference

_silu_and_mul = fast.silu_and_mul
_op_silu_and_mul = ops.silu_and_mul.default


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """As the reference, rounded once."""
    if is_compiling():
        return _op_silu_and_mul(x)
    out = _silu_and_mul(x)
    return reference.silu_and_mul(x) if out is NotImplemented else out
