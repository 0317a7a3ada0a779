"""Tiny random float8 checkpoints, and what they mean: transformers with the dequantized weights and quantized rows.

Nothing here is shared with the code that it checks.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import make_model
from torch import nn

FP8 = torch.float8_e4m3fn
TOP = torch.finfo(FP8).max


def compressed(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights},
        "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


# name -> (quantization_config, rows and columns of a weight that share a scale, the scales' name)
FORMATS: dict[str, tuple[dict[str, Any], tuple[int | None, int | None], str]] = {
    "tensor": (compressed({"strategy": "tensor"}), (None, None), "weight_scale"),
    "channel": (compressed({"strategy": "channel"}), (1, None), "weight_scale"),
    "block": (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        },
        (128, 128),
        "weight_scale_inv",
    ),
    "compressed-block": (
        compressed({"strategy": "block", "block_structure": [128, 128]}),
        (128, 128),
        "weight_scale",
    ),
    "some-layers": (
        compressed({"strategy": "channel"}, ignore=["lm_head", "re:.*self_attn.*", "model.layers.1.mlp.down_proj"]),
        (1, None),
        "weight_scale",
    ),
}
# No size is a multiple of 128, and the parts of merged projections begin inside of blocks.
SIZES = {"hidden_size": 160, "intermediate_size": 200, "num_attention_heads": 4, "head_dim": 40}


def is_quantized(name: str, format_name: str) -> bool:
    if format_name == "some-layers":
        return ".mlp." in name and name != "model.layers.1.mlp.down_proj"
    return name != "lm_head"


def quantize_weight(weight: torch.Tensor, block: tuple[int | None, int | None]) -> tuple[torch.Tensor, ...]:
    """(float8 weight, its scales as checkpoints hold them, what they mean), block by block."""
    rows, columns = block[0] or weight.shape[0], block[1] or weight.shape[1]
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    values = torch.empty(weight.shape, dtype=FP8)
    meant = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[part].abs().max() / TOP
            values[part] = (weight[part] / scales[i, j]).clamp(-TOP, TOP).to(FP8)
            meant[part] = values[part].float() * scales[i, j]
    return values, scales, meant


def as_quantized(columns: int | None) -> Any:
    """A hook for a layer: its rows lose what float8 can't hold."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = args[0]
        parts = x.split(columns or x.shape[-1], -1)
        scales = [part.abs().amax(-1, keepdim=True) / TOP for part in parts]
        return torch.cat([(p / s).clamp(-TOP, TOP).to(FP8).float() * s for p, s in zip(parts, scales, strict=True)], -1)

    return hook


def make_quantized(family: str, format_name: str, directory: Path) -> Any:
    """Writes a checkpoint; returns transformers' model of what it means."""
    config, block, scale_name = FORMATS[format_name]
    model = make_model(family, **SIZES)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(name, format_name):
            values, scales, module.weight.data = quantize_weight(module.weight.data, block)
            tensors[f"{name}.weight"] = values
            tensors[f"{name}.{scale_name}"] = scales.reshape(1) if block == (None, None) else scales
            module.register_forward_pre_hook(as_quantized(block[1]))
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            tensors.setdefault(name, tensor)
    save_file(tensors, directory / "model.safetensors")
    settings = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(settings))
    return model
