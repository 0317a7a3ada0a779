"""Architectures and the files that hold them."""

import difflib
import importlib
from typing import Any

from atom.utils.errors import ModelLoadError

# Architecture, as config.json names it -> "module.Class" below atom/models.
MODELS = {
    "LlamaForCausalLM": "llama.LlamaForCausalLM",
    "MistralForCausalLM": "llama.MistralForCausalLM",
    "MixtralForCausalLM": "mixtral.MixtralForCausalLM",
    "Qwen2ForCausalLM": "qwen2.Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "qwen3.Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "qwen3_moe.Qwen3MoeForCausalLM",
}


def get_model_class(hf_config: Any) -> type:
    """The class for a config's architecture. Raises ModelLoadError naming what is supported."""
    architectures = list(getattr(hf_config, "architectures", None) or [])
    for name in architectures:
        if name in MODELS:
            module, _, attribute = MODELS[name].partition(".")
            return getattr(importlib.import_module(f"atom.models.{module}"), attribute)
    if not architectures:
        raise ModelLoadError(f"config.json names no architectures; supported: {', '.join(MODELS)}")
    near = difflib.get_close_matches(architectures[0], MODELS, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise ModelLoadError(f"architectures={architectures} is not supported{hint}; supported: {', '.join(MODELS)}")
