"""RMS normalization."""

from typing import Any

import torch
from torch import nn

from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.layers.module import Layer


class RMSNorm(Layer):
    """forward(x) -> y; forward(x, residual) -> (y, x + residual), where y normalizes the sum."""

    def __init__(self, size: int, eps: float, *, context: BuildContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=context.dtype), requires_grad=False)
        self.eps = eps
        self._norm = get_op("rms_norm", context.fusable_backends)
        self._add_norm = get_op("add_rms_norm", context.fusable_backends)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return self._norm(x, self.weight, self.eps)
        return self._add_norm(x, residual, self.weight, self.eps)
