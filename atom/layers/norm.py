"""RMS normalization."""

from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.layers.module import Layer
from atom.layers.quant.base import PendingNorm, QuantizedRows


class RMSNorm(Layer):
    """forward(x) -> y; forward(x, residual) -> (y, x + residual), where y normalizes the sum.

    feeds: the only layer that reads y, a linear one. Where it multiplies quantized rows and the context fuses norms
    with quantizing, y is QuantizedRows. Where the context fuses norms with such layers, y is a PendingNorm, and what
    is returned as x + residual is only that once the layer has run.
    """

    def __init__(self, size: int, eps: float, *, context: BuildContext, feeds: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=context.dtype), requires_grad=False)
        self.eps = eps
        self._norm = get_op("rms_norm", context.fusable_backends)
        self._add_norm = get_op("add_rms_norm", context.fusable_backends)
        self._row_format = feeds.method.row_format if feeds is not None and context.fuses_norm_quant else None
        self._is_pending = feeds is not None and context.fuses_norm_linear and feeds.method.takes_pending_norms
        self._norm_quant = get_op("rms_norm_quant", context.fusable_backends)
        self._add_norm_quant = get_op("add_rms_norm_quant", context.fusable_backends)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if self._row_format is not None:
            return self._forward_quant(x, residual, *self._row_format)
        if self._is_pending and not is_compiling():
            pending = PendingNorm(x, residual, self.weight, self.eps)
            return pending if residual is None else (pending, residual)
        if residual is None:
            return self._norm(x, self.weight, self.eps)
        return self._add_norm(x, residual, self.weight, self.eps)

    def _forward_quant(
        self, x: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype, group_size: int | None
    ) -> Any:
        if residual is None:
            return QuantizedRows(*self._norm_quant(x, self.weight, self.eps, dtype, group_size))
        values, scales, total = self._add_norm_quant(x, residual, self.weight, self.eps, dtype, group_size)
        return QuantizedRows(values, scales), total
