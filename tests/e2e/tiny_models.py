"""Tiny random checkpoints of every family, written by transformers: the reference for end-to-end tests."""

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}

# One of each family, as it usually comes: name -> (model_type, what differs from COMMON).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "norm_topk_prob": True}),
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

# The settings a family's checkpoints differ in, by the same scheme.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-smollm2": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-llama3-rope": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "llama-dynamic-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "llama-yarn-rope": ("llama", {"rope_parameters": _YARN}),
    "llama-odd-sizes": ("llama", {"vocab_size": 157, "intermediate_size": 90, "hidden_size": 60, "head_dim": 16}),
    "llama-ignored-window": ("llama", {"sliding_window": 4}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mixtral-window": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 9}),
    "qwen2-window": ("qwen2", _WINDOW),
    "qwen2-layer-types": (
        "qwen2",
        {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "head_dim": 8}),
    "qwen3-window": ("qwen3", {**_WINDOW, "head_dim": 16}),
    "qwen3_moe-raw-weights": ("qwen3_moe", {**MOE, "norm_topk_prob": False, "attention_bias": True}),
    "qwen3_moe-some-dense": (
        "qwen3_moe",
        {**MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3_moe-window": ("qwen3_moe", {**MOE, "use_sliding_window": True, "sliding_window": 9}),
}


def make_model(name: str, **overrides: Any) -> Any:
    """transformers' model of a family or variant: random weights, float32, eager attention.

    The numbers are large enough that logits spread and every part of the model shows in them, and no
    norm weight or bias is at its neutral value, so that leaving one out shows too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differences = (FAMILIES | VARIANTS)[name]
    config = AutoConfig.for_model(model_type, **{**COMMON, **differences, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 0.0 if parameter_name.endswith("bias") else 1.0
                parameter.normal_(center, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
        model.get_input_embeddings().weight.normal_(0.0, 1.0, generator=generator)
    return model


def make_checkpoint(name: str, directory: Path, **overrides: Any) -> str:
    """Writes `make_model` to `directory`; returns its path."""
    make_model(name, **overrides).save_pretrained(directory)
    return str(directory)
