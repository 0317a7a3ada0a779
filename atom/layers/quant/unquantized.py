"""Weights in the model's own dtype."""

import torch
from torch import nn

from atom.kernels import get_op
from atom.layers.quant.base import LinearMethod, PendingNorm, Rows


class UnquantizedLinearMethod(LinearMethod):
    takes_pending_norms = True

    def __init__(self) -> None:
        self._prepare = get_op("prepare_linear_weight")
        self._linear = get_op("linear")
        self._norm_linear = get_op("rms_norm_linear")

    def create_weights(self, layer: nn.Module, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        layer.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = nn.Parameter(self._prepare(layer.weight.data), requires_grad=False)

    def apply(self, layer: nn.Module, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(x, PendingNorm):
            return self._norm_linear(*x, layer.weight, bias, layer.out_features)
        return self._linear(x, layer.weight, bias, layer.out_features)
