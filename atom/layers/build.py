"""What a model needs to know to build its layers; the only channel from the engine's settings to layers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from atom.distributed.parallel_state import TPGroup, get_tp_group

if TYPE_CHECKING:
    from atom.config import QuantizationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Passed to every model and layer constructor.

    dtype: of weights and activations. kv_cache_dtype: == dtype, or the platform's float8.
    quant_config: None or an object whose get_layer_quant_config(prefix) says how a layer is stored.
    fusable_backends: where layers take norms, activations and rotations from; None = the platform's order.
        Plain torch when a compiler will fuse them with their neighbours.
    fuses_qkv: norm and rotation of query and key and the cache write are one op.
    fuses_norm_quant, fuses_activation_quant: a norm, or the gated activation, quantizes what a quantized layer reads.
    fuses_norm_linear: a norm is computed by the linear layer that reads it, where that is not quantized.
    fp8_dtype: the platform's float8, of what is multiplied with float8 weights.
    """

    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    block_size: int
    max_model_len: int
    attention_backend: str = "auto"
    fuses_qkv: bool = False
    fuses_norm_quant: bool = False
    fuses_activation_quant: bool = False
    fuses_norm_linear: bool = False
    quant_config: "QuantizationConfig | None" = None
    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    fusable_backends: tuple[str, ...] | None = None
    tp: TPGroup = field(default_factory=get_tp_group)
