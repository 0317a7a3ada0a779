"""The gated MLP of the Llama family: down(silu(gate(x)) * up(x))."""

from typing import Any

import torch
from torch import nn

from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from atom.layers.module import Layer
from atom.layers.quant.base import PendingNorm, QuantizedRows, RowFormat, Rows
from atom.layers.quant.unquantized import UnquantizedLinearMethod
from atom.utils.errors import ModelLoadError


class GateUpSiluLinear(MergedColumnParallelLinear):
    """Gate and up projections and their activation: [T, H] -> [T, I]; one kernel when not quantized.

    Where `quantizes` is set, the result is QuantizedRows of that format.
    """

    quantizes: RowFormat | None = None

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool, context: BuildContext, prefix: str):
        super().__init__(hidden_size, [intermediate_size] * 2, bias=bias, context=context, prefix=prefix)
        self.is_one_kernel = not bias and isinstance(self.method, UnquantizedLinearMethod)
        self._prepare = get_op("prepare_silu_linear_weight")
        self._linear_silu_and_mul = get_op("linear_silu_and_mul")
        self._norm_linear_silu_and_mul = get_op("rms_norm_linear_silu_and_mul")
        self._silu_and_mul = get_op("silu_and_mul", context.fusable_backends)
        self._silu_and_mul_quant = get_op("silu_and_mul_quant", context.fusable_backends)
        self._intermediate_size = self.parts[0]

    def process_weights_after_loading(self) -> None:
        if self.is_one_kernel:
            self.weight = nn.Parameter(self._prepare(self.weight.data), requires_grad=False)
            Layer.process_weights_after_loading(self)
        else:
            super().process_weights_after_loading()

    def forward(self, x: Rows) -> Any:
        if self.is_one_kernel:
            if isinstance(x, PendingNorm):
                return self._norm_linear_silu_and_mul(*x, self.weight, self._intermediate_size)
            return self._linear_silu_and_mul(x, self.weight, self._intermediate_size)
        gate_up = super().forward(x)
        if self.quantizes is not None:
            return QuantizedRows(*self._silu_and_mul_quant(gate_up, *self.quantizes))
        return self._silu_and_mul(gate_up)


class GatedMLP(Layer):
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        *,
        bias: bool = False,
        context: BuildContext,
        prefix: str,
    ) -> None:
        super().__init__()
        if activation not in ("silu", "swish"):
            raise ModelLoadError(f"hidden_act={activation!r} is not supported; use a model with silu")
        self.gate_up_proj = GateUpSiluLinear(
            hidden_size, intermediate_size, bias=bias, context=context, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias=bias, context=context, prefix=f"{prefix}.down_proj"
        )
        if context.fuses_activation_quant and not self.gate_up_proj.is_one_kernel:
            self.gate_up_proj.quantizes = self.down_proj.method.row_format

    def forward(self, x: Rows) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x))
