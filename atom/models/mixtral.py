"""Mixtral (https://arxiv.org/abs/2401.04088): Mistral with experts in place of the MLP."""

from typing import Any

import torch
from torch import nn

from atom.layers.build import BuildContext
from atom.layers.linear import ReplicatedLinear
from atom.layers.module import Layer
from atom.layers.moe.fused_moe import FusedMoE
from atom.models.llama import LlamaForCausalLM, MistralDecoderLayer


class MixtralMoeBlock(Layer):
    def __init__(self, config: Any, *, context: BuildContext, prefix: str) -> None:
        super().__init__()
        num_experts = config.num_local_experts
        self.gate = ReplicatedLinear(config.hidden_size, num_experts, context=context, prefix=f"{prefix}.gate")
        self.experts = FusedMoE(
            num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            renormalize=True,
            context=context,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.gate(x))


class MixtralDecoderLayer(MistralDecoderLayer):
    def make_mlp(self, config: Any, index: int, context: BuildContext, prefix: str) -> nn.Module:
        return MixtralMoeBlock(config, context=context, prefix=prefix)


class MixtralForCausalLM(LlamaForCausalLM):
    layer_class = MixtralDecoderLayer
    expert_mapping = {
        "gate_proj": ("w13_weight", 0),
        "up_proj": ("w13_weight", 1),
        "down_proj": ("w2_weight", 0),
        "w1": ("w13_weight", 0),
        "w3": ("w13_weight", 1),
        "w2": ("w2_weight", 0),
    }

    @staticmethod
    def map_weight_name(name: str) -> str:
        return name.replace(".block_sparse_moe.", ".mlp.")
