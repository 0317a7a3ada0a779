"""Small models whose parameters load themselves as the parallel layers do, and checkpoints to fill them from."""

import gguf
import numpy as np
import torch
from torch import nn


class Fused(nn.Module):
    """Several projections in one weight, as QKVParallelLinear and MergedColumnParallelLinear hold them."""

    def __init__(self, rows: list[int], columns: int, bias: bool = False) -> None:
        super().__init__()
        self.rows = rows
        self.weight = self._stacked(torch.empty(sum(rows), columns))
        if bias:
            self.bias = self._stacked(torch.empty(sum(rows)))

    def _stacked(self, data):
        param = nn.Parameter(data)
        param.num_shards = len(self.rows)
        param.weight_loader = self.load
        return param

    def load(self, param, loaded, shard_id, expert_id):
        assert shard_id is not None
        part = param.data.split(self.rows)[shard_id]
        assert part.shape == loaded.shape, f"expected {list(part.shape)}"
        part.copy_(loaded)


class Experts(nn.Module):
    def __init__(self, num: int, hidden: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.w13_weight = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.w2_weight = nn.Parameter(torch.empty(num, hidden, width))
        self.w13_weight.num_shards, self.w2_weight.num_shards = 2 * num, num
        self.w13_weight.weight_loader = self.w2_weight.weight_loader = self.load

    def load(self, param, loaded, shard_id, expert_id):
        part = param.data[expert_id]
        if param is self.w13_weight:
            part = part[shard_id * self.width : (shard_id + 1) * self.width]
        assert part.shape == loaded.shape, f"expected {list(part.shape)}"
        part.copy_(loaded)


class Leaf(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class StandIn(nn.Module):
    """The parameters of a decoder of the Llama, Qwen and Mixtral kinds; it computes nothing."""

    packed_modules_mapping = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

    def __init__(self, hf, context=None) -> None:
        super().__init__()
        heads, kv_heads, dim = hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim
        mixtral = hf.model_type == "mixtral"
        self.expert_mapping = (
            {"w1": ("w13_weight", 0), "w3": ("w13_weight", 1), "w2": ("w2_weight", 0)}
            if mixtral
            else {"gate_proj": ("w13_weight", 0), "up_proj": ("w13_weight", 1), "down_proj": ("w2_weight", 0)}
        )
        self.model = nn.Module()
        self.model.embed_tokens = Leaf(hf.vocab_size, hf.hidden_size)
        layers = []
        for _ in range(hf.num_hidden_layers):
            layer = nn.Module()
            layer.input_layernorm = Leaf(hf.hidden_size)
            layer.post_attention_layernorm = Leaf(hf.hidden_size)
            layer.self_attn = nn.Module()
            rows = [heads * dim, kv_heads * dim, kv_heads * dim]
            layer.self_attn.qkv_proj = Fused(rows, hf.hidden_size, bias=hf.model_type == "qwen2")
            layer.self_attn.o_proj = Leaf(hf.hidden_size, heads * dim)
            if hf.model_type.startswith("qwen3"):
                layer.self_attn.q_norm, layer.self_attn.k_norm = Leaf(dim), Leaf(dim)
            num_experts = getattr(hf, "num_local_experts", None) or getattr(hf, "num_experts", None)
            if num_experts:
                moe = nn.Module()
                moe.gate = Leaf(num_experts, hf.hidden_size)
                width = hf.intermediate_size if mixtral else hf.moe_intermediate_size
                moe.experts = Experts(num_experts, hf.hidden_size, width)
                layer.add_module("block_sparse_moe" if mixtral else "mlp", moe)
            else:
                layer.mlp = nn.Module()
                layer.mlp.gate_up_proj = Fused([hf.intermediate_size] * 2, hf.hidden_size)
                layer.mlp.down_proj = Leaf(hf.hidden_size, hf.intermediate_size)
            layers.append(layer)
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = Leaf(hf.hidden_size)
        self.lm_head = Leaf(hf.vocab_size, hf.hidden_size)
        if hf.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**MOE, "num_experts": 4},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
}


def make_hf_model(model_type: str, **overrides):
    """transformers' own model with random weights; norms differ from 1, so that a swap shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**COMMON, **FAMILIES[model_type], **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(1.0 if param.ndim == 1 else 0.0, 0.5)
    return model


def expected_weights(state: dict[str, torch.Tensor], stand_in: StandIn) -> dict[str, torch.Tensor]:
    """What the stand-in must hold: transformers' tensors, fused by hand."""
    result = {}
    for name in stand_in.state_dict():
        leaf = name.rsplit(".", 1)[-1]
        source = name.replace("block_sparse_moe", "mlp")
        if "qkv_proj" in name:
            result[name] = torch.cat([state[name.replace("qkv_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        elif "gate_up_proj" in name:
            result[name] = torch.cat([state[name.replace("gate_up_proj", part)] for part in ("gate_proj", "up_proj")])
        elif leaf == "w13_weight":
            result[name] = state[source.replace("w13_weight", "gate_up_proj")]
        elif leaf == "w2_weight":
            result[name] = state[source.replace("w2_weight", "down_proj")]
        else:
            result[name] = state[source]
    return result


def assert_holds(stand_in: StandIn, state: dict[str, torch.Tensor]) -> None:
    expected = expected_weights(state, stand_in)
    for name, value in stand_in.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def write_gguf(model, path, encode) -> None:
    """As llama.cpp's converter does. encode(hf_name, float32 array) -> (array to store, its type)."""
    config = model.config
    arch = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "mistral": "llama"}.get(config.model_type, config.model_type)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if "experts" in str(model):
        writer.add_expert_count(getattr(config, "num_local_experts", 4))
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            prefix = f"blk.{name.split('.')[2]}"
            parts = [(f"{prefix}.ffn_gate_exps.weight", gate), (f"{prefix}.ffn_up_exps.weight", up)]
        elif name.endswith("experts.down_proj"):
            parts = [(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", tensor)]
        else:
            known = name.replace("mlp.gate.", "block_sparse_moe.gate.") if config.model_type == "mixtral" else name
            stored = names.get_name(known, try_suffixes=(".weight", ".bias"))
            assert stored is not None, name
            if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            parts = [(stored, tensor)]
        for stored, part in parts:
            data, qtype = encode(stored, part.contiguous().numpy())
            writer.add_tensor(stored, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_SCALE_BYTES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}


def random_blocks(shape: tuple[int, ...], qtype: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    """Valid quantized bytes for a type that the package can read but not write: random, with finite scales."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block, block_bytes), dtype=np.uint8)
    start, end = _SCALE_BYTES[qtype.name]
    scales = rng.uniform(-1, 1, (len(blocks), (end - start) // 2)).astype(np.float16)
    blocks[:, start:end] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
