"""A GGUF file's metadata as a transformers configuration.

Covers the architectures ATOM's GGUF loader covers. Reads no weights, except the handful of rope factors
by which Llama 3.1 files say that their rotary frequencies are scaled.
"""

import math
from typing import TYPE_CHECKING, Any

from atom.utils.errors import ModelLoadError
from atom.utils.gguf_file import GGUFFile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# general.architecture -> (transformers' model_type, its model class)
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
_FILE_TYPE_DTYPES = {0: "float32", 1: "float16", 32: "bfloat16"}  # general.file_type; others are quantized
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message


def gguf_hf_config(gguf: GGUFFile) -> "PretrainedConfig":
    """Raises ModelLoadError for an architecture, a rope scaling or a missing key that can't be translated."""
    name = gguf.architecture
    if name not in _ARCHITECTURES:
        supported = ", ".join(sorted(_ARCHITECTURES))
        raise ModelLoadError(f"{gguf.path}: GGUF architecture {name!r} is not supported; {supported} are")
    model_type, model_class = _ARCHITECTURES[name]
    num_experts = gguf.get("expert_count", 0)
    if model_type == "llama" and num_experts:
        model_type, model_class = "mixtral", "MixtralForCausalLM"

    hidden_size, num_heads = _need(gguf, "embedding_length"), _need(gguf, "attention.head_count")
    head_dim = gguf.get("attention.key_length") or gguf.get("rope.dimension_count") or hidden_size // num_heads
    values: dict[str, Any] = {
        "architectures": [model_class],
        "vocab_size": _vocab_size(gguf),
        "hidden_size": hidden_size,
        "intermediate_size": _need(gguf, "feed_forward_length"),
        "num_hidden_layers": _need(gguf, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _need(gguf, "context_length"),
        "rms_norm_eps": _need(gguf, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "rope_parameters": _rope(gguf, head_dim),
        "bos_token_id": _token(gguf, "bos_token_id"),
        "eos_token_id": _token(gguf, "eos_token_id"),
        "pad_token_id": _token(gguf, "padding_token_id"),
        "dtype": _FILE_TYPE_DTYPES.get(gguf.metadata.get("general.file_type", -1)),
    }
    if model_type == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    if model_type in ("mistral", "mixtral"):
        values["sliding_window"] = gguf.get("attention.sliding_window")
    if model_type == "mixtral":
        values |= {"num_local_experts": num_experts, "num_experts_per_tok": _need(gguf, "expert_used_count")}
    if model_type == "qwen3_moe":
        values |= {
            "num_experts": num_experts,
            "num_experts_per_tok": _need(gguf, "expert_used_count"),
            "moe_intermediate_size": _need(gguf, "expert_feed_forward_length"),
            "norm_topk_prob": True,  # the format has no key for it; every released model normalizes
        }
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **values)
    config.name_or_path = str(gguf.path)
    return config


def gguf_stop_token_ids(gguf: GGUFFile) -> list[int]:
    """The tokens that the tokenizer says end a text, a turn or a message."""
    ids = [_token(gguf, key) for key in _END_KEYS]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _need(gguf: GGUFFile, key: str) -> Any:
    value = gguf.get(key)
    if value is None:
        raise ModelLoadError(f"{gguf.path}: GGUF metadata lacks {gguf.architecture}.{key}")
    if isinstance(value, list):  # some architectures give one value a layer
        if len(set(value)) != 1:
            raise ModelLoadError(f"{gguf.path}: {gguf.architecture}.{key} differs between layers; not supported")
        return value[0]
    return value


def _token(gguf: GGUFFile, key: str) -> int | None:
    return gguf.metadata.get(f"tokenizer.ggml.{key}")


def _vocab_size(gguf: GGUFFile) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{gguf.path}: the tensor token_embd.weight is missing")
    return embedding.shape[0]


def _rope(gguf: GGUFFile, head_dim: int) -> dict[str, Any]:
    theta = float(gguf.get("rope.freq_base", 10000.0))
    kind = gguf.get("rope.scaling.type", "none")
    factor = gguf.get("rope.scaling.factor", gguf.get("rope.scale_linear", 1.0))
    original = gguf.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in gguf.tensors:
        return {"rope_theta": theta, **_llama3_rope(gguf, theta, head_dim, original)}
    if kind == "none" and factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind in ("linear", "none"):
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        yarn = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
        names = {"original_max_position_embeddings": original}
        names["attention_factor"] = gguf.get("rope.scaling.attn_factor")
        names["beta_fast"] = gguf.get("rope.scaling.yarn_beta_fast")
        names["beta_slow"] = gguf.get("rope.scaling.yarn_beta_slow")
        return yarn | {name: value for name, value in names.items() if value is not None}
    raise ModelLoadError(f"{gguf.path}: rope scaling type {kind!r} is not supported; linear, yarn and llama3 are")


def _llama3_rope(gguf: GGUFFile, theta: float, head_dim: int, original: int | None) -> dict[str, Any]:
    """The parameters behind Llama 3.1's table of factors, which is all that its GGUF files keep of them."""
    import numpy as np

    info = gguf.tensors["rope_freqs.weight"]
    if info.ggml_type != 0 or info.shape != (head_dim // 2,):
        raise ModelLoadError(f"{gguf.path}: rope_freqs.weight is not float32 [{head_dim // 2}]")
    factors = np.fromfile(gguf.path, dtype="<f4", count=info.shape[0], offset=info.offset)
    if len(factors) < info.shape[0]:
        raise ModelLoadError(f"{gguf.path} is truncated: rope_freqs.weight is missing")
    if np.allclose(factors, 1.0):
        return {"rope_type": "default"}
    low, high, original = 1.0, 4.0, original or 8192
    factor = float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelLoadError(f"{gguf.path}: rope_freqs.weight is not the table of Llama 3.1; not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
