"""Qwen3, dense (https://arxiv.org/abs/2505.09388): Llama with normalized query and key heads."""

from typing import Any

from torch import nn

from atom.layers.build import BuildContext
from atom.layers.rotary import RotaryEmbedding
from atom.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from atom.models.qwen2 import window_of


class Qwen3DecoderLayer(LlamaDecoderLayer):
    def make_attention(
        self, config: Any, index: int, rope: RotaryEmbedding, context: BuildContext, prefix: str
    ) -> nn.Module:
        return LlamaAttention(
            config, rope, context=context, prefix=prefix, qk_norm=True, sliding_window=window_of(config, index)
        )


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3DecoderLayer
