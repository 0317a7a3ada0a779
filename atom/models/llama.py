"""Llama (https://arxiv.org/abs/2407.21783) and what shares its shape: Llama 2/3, SmolLM2, Mistral.

The mathematics of a decoder with grouped-query attention, rotary positions and a gated MLP. Other families
subclass the parts that differ.
"""

from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from atom.forward_context import get_forward_context
from atom.layers.attention.base import PackedRotation
from atom.layers.attention.layer import Attention
from atom.layers.build import BuildContext
from atom.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from atom.layers.linear import QKVParallelLinear, RowParallelLinear
from atom.layers.mlp import GatedMLP
from atom.layers.module import Layer
from atom.layers.norm import RMSNorm
from atom.layers.quant.base import Rows
from atom.layers.rotary import RotaryEmbedding, get_rope


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class LlamaAttention(Layer):
    """Projections, rotation, attention. qk_norm: RMSNorm of each query and key head before the rotation."""

    def __init__(
        self,
        config: Any,
        rope: RotaryEmbedding,
        *,
        context: BuildContext,
        prefix: str,
        qkv_bias: bool | None = None,
        qk_norm: bool = False,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        head_dim = head_dim_of(config)
        bias = bool(getattr(config, "attention_bias", False))
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=bias if qkv_bias is None else qkv_bias,
            context=context,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim,
            config.hidden_size,
            bias=bias,
            context=context,
            prefix=f"{prefix}.o_proj",
        )
        num_heads, num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.attn = Attention(
            num_heads,
            num_kv_heads,
            head_dim,
            layer_name=f"{prefix}.attn",
            context=context,
            sliding_window=sliding_window or 0,
        )
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, context=context)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, context=context)
        self._rope = rope
        self._fuses_qkv = context.fuses_qkv
        if self._fuses_qkv:
            self.attn.rotate_with(self._rotation)
        self._heads = [num_heads, num_kv_heads, num_kv_heads]
        self._head_dim = head_dim

    def forward(self, positions: torch.Tensor, x: Rows) -> torch.Tensor:
        qkv = self.qkv_proj(x).view(positions.shape[0], -1, self._head_dim)
        if self._fuses_qkv:
            return self.o_proj(self.attn.forward_packed(positions, qkv))
        q, k, v = qkv.split_with_sizes(self._heads, 1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        self._rope(positions, q, k)
        return self.o_proj(self.attn(q, k, v))

    def _rotation(self) -> PackedRotation:
        return PackedRotation(
            cos_sin_cache=self._rope.cos_sin_cache,
            interleaved=self._rope.interleaved,
            q_weight=self.q_norm.weight if self.qk_norm else None,
            k_weight=self.k_norm.weight if self.qk_norm else None,
            eps=self.q_norm.eps if self.qk_norm else 0.0,
        )


class LlamaDecoderLayer(Layer):
    """Pre-norm attention and MLP; the residual stream is carried beside x, added by the next norm."""

    def __init__(self, config: Any, index: int, rope: RotaryEmbedding, *, context: BuildContext, prefix: str) -> None:
        super().__init__()
        self.self_attn = self.make_attention(config, index, rope, context, f"{prefix}.self_attn")
        self.mlp = self.make_mlp(config, index, context, f"{prefix}.mlp")
        size, eps = config.hidden_size, config.rms_norm_eps
        gate_up_proj = getattr(self.mlp, "gate_up_proj", None)  # experts have none
        self.input_layernorm = RMSNorm(size, eps, context=context, feeds=self.self_attn.qkv_proj)
        self.post_attention_layernorm = RMSNorm(size, eps, context=context, feeds=gate_up_proj)
        self._is_last = index == config.num_hidden_layers - 1

    def make_attention(
        self, config: Any, index: int, rope: RotaryEmbedding, context: BuildContext, prefix: str
    ) -> nn.Module:
        return LlamaAttention(config, rope, context=context, prefix=prefix)

    def make_mlp(self, config: Any, index: int, context: BuildContext, prefix: str) -> nn.Module:
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            bias=bool(getattr(config, "mlp_bias", False)),
            context=context,
            prefix=prefix,
        )

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions, x)
        if self._is_last and not is_compiling():
            x, residual = _wanted(x, residual)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


def _wanted(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the rows that nobody asks for: after its attention, the last layer computes each for itself."""
    rows = get_forward_context().wanted_rows
    return (x, residual) if rows is None else (x.index_select(0, rows), residual.index_select(0, rows))


class LlamaModel(Layer):
    def __init__(self, config: Any, layer_class: type[LlamaDecoderLayer], context: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context=context)
        rope = get_rope(config, head_dim_of(config), context=context)
        self.layers = nn.ModuleList(
            layer_class(config, i, rope, context=context, prefix=f"model.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context=context)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        x, _ = self.norm(x, residual)
        return x


class LlamaForCausalLM(Layer):
    """input_ids, positions: int64 [T] -> hidden [T, hidden_size] after the last norm."""

    packed_modules_mapping = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    layer_class: type[LlamaDecoderLayer] = LlamaDecoderLayer

    def __init__(self, config: Any, context: BuildContext) -> None:
        super().__init__()
        self.model = LlamaModel(config, self.layer_class, context)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, context=context)
        if getattr(config, "tie_word_embeddings", False):
            self.lm_head.tie(self.model.embed_tokens)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> float32 [R, vocab_size]"""
        return self.lm_head(hidden)

    def likeliest_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> int64 [R], without logits where these would cost more than finding them"""
        return self.lm_head.likeliest(hidden)


class MistralDecoderLayer(LlamaDecoderLayer):
    """Every layer may have a sliding window (Mistral 7B, https://arxiv.org/abs/2310.06825)."""

    def make_attention(
        self, config: Any, index: int, rope: RotaryEmbedding, context: BuildContext, prefix: str
    ) -> nn.Module:
        return LlamaAttention(config, rope, context=context, prefix=prefix, sliding_window=config.sliding_window)


class MistralForCausalLM(LlamaForCausalLM):
    layer_class = MistralDecoderLayer
