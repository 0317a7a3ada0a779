"""Float8 weights with float32 scales, multiplied with rows that are quantized as they come."""

import torch
from torch import nn

from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.layers.quant.base import LinearMethod, QuantizedRows, RowFormat, Rows

BLOCK = 128  # rows and columns of a weight that share a scale, where the checkpoint has blocks


class ScaledLinearMethod(LinearMethod):
    """weight: float8 [N, K]; weight_scale: float32 [N, 1], or [N, K / group_size rounded up].

    Checkpoints share scales among a whole tensor, an output row or a block. A scale for each row says all of these,
    also of projections that are merged or cut where no block begins. Rows of x get a scale each (or for each group of
    columns), so that a token's result depends on no other token.
    """

    def __init__(self, group_size: int | None, context: BuildContext) -> None:
        self.row_format: RowFormat = RowFormat(context.fp8_dtype, group_size)
        self._group_size = group_size
        self._dtype = context.dtype
        self._quantize = get_op("quantize", context.fusable_backends)
        self._prepare = get_op("prepare_quant_weight")
        self._linear = get_op("quant_linear")

    def create_weights(self, layer: nn.Module, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        groups = 1 if self._group_size is None else -(-in_features // self._group_size)
        weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        scale = torch.empty(out_features, groups, dtype=torch.float32)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight, scale = layer.get_parameter("weight").data, layer.get_parameter("weight_scale").data
        if self.row_format.dtype == torch.float8_e4m3fnuz:
            weight, scale = to_fnuz(weight, scale)
        weight = self._prepare(weight, scale, self._group_size, self._dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def apply(self, layer: nn.Module, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        values, scales = x if isinstance(x, QuantizedRows) else self._quantize(x, *self.row_format)
        return self._linear(
            values, scales, layer.weight, layer.weight_scale, bias, self._group_size, layer.out_features, self._dtype
        )


def scales_by_row(loaded: torch.Tensor, rows: int) -> torch.Tensor:
    """A checkpoint's scales of a weight with `rows` rows, one for all, one a row or one a block -> [rows, groups]."""
    if loaded.numel() == 1:
        return loaded.reshape(1, 1).expand(rows, 1)
    if loaded.dim() == 1:
        return loaded.unsqueeze(1)
    if loaded.shape[0] == -(-rows // BLOCK) != rows:
        return loaded.repeat_interleave(BLOCK, 0)[:rows]
    return loaded


def to_fnuz(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same products in gfx942's float8, in which the same bits mean half as much, and those of -0 mean NaN."""
    bits = weight.view(torch.uint8)
    bits = torch.where(bits == 0x80, 0, bits)
    return bits.view(torch.float8_e4m3fnuz), scale * 2
