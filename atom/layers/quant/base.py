"""How a linear layer stores and applies its weight; one method a storage format."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import nn


class QuantizedRows(NamedTuple):
    """values [T, N] in eight bits, float32 scales [T, groups]: what `quantize` makes of rows."""

    values: torch.Tensor
    scales: torch.Tensor


class PendingNorm(NamedTuple):
    """rms_norm(x), or of x + residual, which the residual becomes: the layer that reads the result computes it."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    eps: float


Rows = torch.Tensor | QuantizedRows | PendingNorm  # what linear layers multiply


class RowFormat(NamedTuple):
    """How a layer wants the rows it multiplies: the last arguments of `quantize` and of the ops fused with it."""

    dtype: torch.dtype
    group_size: int | None


class LinearMethod(ABC):
    """Stateless; what it creates lives on the layer.

    row_format: of the QuantizedRows that `apply` also takes as x; None = none.
    takes_pending_norms: whether x may be a PendingNorm.
    """

    row_format: RowFormat | None = None
    takes_pending_norms = False

    @abstractmethod
    def create_weights(self, layer: nn.Module, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        """Give the layer its parameters: `weight` [out_features, in_features] or what replaces it, and, if it has
        scales, `weight_scale` [out_features, groups of columns]."""

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn the loaded parameters into what `apply` reads."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] -> [T, out_features]"""
