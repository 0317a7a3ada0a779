"""Rotary position embeddings with the scalings that checkpoints ask for."""

from typing import Any

import torch
from torch import nn

from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.utils.errors import ModelLoadError


class RotaryEmbedding(nn.Module):
    """Rotates query and key in place by a table of cosines and sines, float32 [max_model_len, rotary_dim]."""

    def __init__(self, table: torch.Tensor, interleaved: bool = False) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", table, persistent=False)
        self.cos_sin_cache: torch.Tensor
        self.interleaved = interleaved
        self._rotate_ = get_op("rotary_embedding_")

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        """positions int64 [T]; query [T, Hq, D] and key [T, Hk, D], views allowed."""
        self._rotate_(positions, query, key, self.cos_sin_cache, self.interleaved)


def rope_parameters(config: Any) -> dict[str, Any]:
    """{"rope_type", "rope_theta", ...} in transformers' present form, also from older configs."""
    parameters = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    return parameters


def get_rope(config: Any, head_dim: int, *, context: BuildContext) -> RotaryEmbedding:
    """The rotary embedding a config asks for. Raises ModelLoadError for an unknown scaling."""
    parameters = rope_parameters(config)
    kind = parameters["rope_type"]
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    factor = 1.0
    if kind == "default":
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
        inv_freq = 1.0 / (parameters["rope_theta"] ** exponent)
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind not in ROPE_INIT_FUNCTIONS:
            raise ModelLoadError(f"rope_type={kind!r} is unknown; known: default, {', '.join(ROPE_INIT_FUNCTIONS)}")
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context.max_model_len)
    # Built on the CPU, so that every platform rotates by the same angles.
    angles = torch.outer(torch.arange(context.max_model_len, dtype=torch.float32, device="cpu"), inv_freq.float().cpu())
    table = torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)
    return RotaryEmbedding(table.to(torch.get_default_device()))
