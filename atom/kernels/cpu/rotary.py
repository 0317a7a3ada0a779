"""Rotary position embedding in C++."""

import torch
from torch.compiler import is_compiling

from atom.kernels.cpu.ops import fast, ops
from atom.kernels.torch import rotary as reference

_rotary = fast.rotary
_op_rotary = ops.rotary.default


def rotary_embedding_(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """As the reference, computed in float32 and rounded once."""
    if is_compiling():
        _op_rotary(positions, query, key, cos_sin_cache, interleaved)
    elif _rotary(positions, query, key, cos_sin_cache, interleaved) is NotImplemented:
        reference.rotary_embedding_(positions, query, key, cos_sin_cache, interleaved)
