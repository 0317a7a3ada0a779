"""RMS normalization."""

import torch
from torch import nn

from atom.kernels import get_op
from atom.layers.build import BuildContext


class RMSNorm(nn.Module):
    """forward(x) -> y; forward(x, residual) -> (y, x + residual), where y normalizes the sum."""

    def __init__(self, size: int, eps: float, *, context: BuildContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=context.dtype), requires_grad=False)
        self.eps = eps
        self._norm = get_op("rms_norm")
        self._add_norm = get_op("add_rms_norm")

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):  # type: ignore[no-untyped-def]
        if residual is None:
            return self._norm(x, self.weight, self.eps)
        return self._add_norm(x, residual, self.weight, self.eps)
