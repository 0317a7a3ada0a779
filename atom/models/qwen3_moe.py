"""Qwen3-MoE (https://arxiv.org/abs/2505.09388): Qwen3 with experts in place of most MLPs."""

from typing import Any

import torch
from torch import nn

from atom.layers.build import BuildContext
from atom.layers.linear import ReplicatedLinear
from atom.layers.mlp import GatedMLP
from atom.layers.module import Layer
from atom.layers.moe.fused_moe import FusedMoE
from atom.layers.rotary import RotaryEmbedding
from atom.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


class Qwen3MoeBlock(Layer):
    def __init__(self, config: Any, *, context: BuildContext, prefix: str) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, context=context, prefix=f"{prefix}.gate")
        self.experts = FusedMoE(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            context=context,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.gate(x))


class Qwen3MoeDecoderLayer(LlamaDecoderLayer):
    def make_attention(
        self, config: Any, index: int, rope: RotaryEmbedding, context: BuildContext, prefix: str
    ) -> nn.Module:
        # Unlike in the dense model, a window is every layer's.
        window = config.sliding_window if config.use_sliding_window else None
        return LlamaAttention(config, rope, context=context, prefix=prefix, qk_norm=True, sliding_window=window)

    def make_mlp(self, config: Any, index: int, context: BuildContext, prefix: str) -> nn.Module:
        sparse = config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
        if sparse and index not in (config.mlp_only_layers or []):
            return Qwen3MoeBlock(config, context=context, prefix=prefix)
        return GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, context=context, prefix=prefix)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3MoeDecoderLayer
    expert_mapping = {
        "gate_proj": ("w13_weight", 0),
        "up_proj": ("w13_weight", 1),
        "down_proj": ("w2_weight", 0),
    }
