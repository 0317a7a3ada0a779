"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2412.15115): Llama with biases on query, key and value."""

from typing import Any

from torch import nn

from atom.layers.build import BuildContext
from atom.layers.rotary import RotaryEmbedding
from atom.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


def window_of(config: Any, index: int) -> int | None:
    """The sliding window of a layer: Qwen's upper layers have one when `use_sliding_window` is set."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return config.sliding_window if layer_types[index] == "sliding_attention" else None
    if getattr(config, "use_sliding_window", False) and index >= config.max_window_layers:
        return config.sliding_window
    return None


class Qwen2DecoderLayer(LlamaDecoderLayer):
    def make_attention(
        self, config: Any, index: int, rope: RotaryEmbedding, context: BuildContext, prefix: str
    ) -> nn.Module:
        return LlamaAttention(
            config, rope, context=context, prefix=prefix, qkv_bias=True, sliding_window=window_of(config, index)
        )


class Qwen2ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen2DecoderLayer
