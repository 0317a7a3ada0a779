"""How a linear layer stores and applies its weight; one method a storage format."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from atom.quant_spec import LayerQuantConfig


class LinearMethod(ABC):
    """Stateless; what it creates lives on the layer."""

    @abstractmethod
    def create_weights(self, layer: nn.Module, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        """Give the layer its parameters: `weight` [out_features, in_features] or what replaces it."""

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn the loaded parameters into what `apply` reads."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] -> [T, out_features]"""


def get_linear_method(spec: "LayerQuantConfig | None") -> LinearMethod:
    """The method for a layer's quantization; None = not quantized."""
    from atom.layers.quant.unquantized import UnquantizedLinearMethod

    if spec is None or spec.quant_type.name == "No":
        return UnquantizedLinearMethod()
    raise NotImplementedError(f"no linear method for {spec}")
