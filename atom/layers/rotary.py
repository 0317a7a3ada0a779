"""Rotary position embeddings with the scalings that checkpoints ask for."""

from dataclasses import dataclass
from typing import Any

import torch

from atom.kernels import get_op
from atom.layers.build import BuildContext
from atom.layers.module import Layer
from atom.utils.errors import ModelLoadError

# transformers' names; `dynamic` and `yarn` are NTK-aware scalings (YaRN: https://arxiv.org/abs/2309.00071).
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


class RotaryEmbedding(Layer):
    """Rotates query and key in place by a table of cosines and sines, float32 [max_model_len, rotary_dim]."""

    def __init__(self, table: torch.Tensor, *, context: BuildContext, interleaved: bool = False) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", table, persistent=False)
        self.cos_sin_cache: torch.Tensor
        self.interleaved = interleaved
        self._rotate_ = get_op("rotary_embedding_", context.fusable_backends)

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        """positions int64 [T]; query [T, Hq, D] and key [T, Hk, D], views allowed."""
        self._rotate_(positions, query, key, self.cos_sin_cache, self.interleaved)


@dataclass(frozen=True, slots=True)
class _RopeConfig:
    """What transformers' rope functions read of a config; a model's own config may lack some or hold None."""

    rope_parameters: dict[str, Any]
    head_dim: int
    max_position_embeddings: int
    hidden_size: int
    num_attention_heads: int = 1

    def standardize_rope_params(self) -> None:
        """`rope_parameters` is complete already."""


def rope_parameters(config: Any) -> dict[str, Any]:
    """{"rope_type", "rope_theta", ...} in transformers' present form, also from older configs."""
    parameters = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = getattr(config, "rope_theta", None) or 10000.0
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    if parameters.get("original_max_position_embeddings") is None:
        parameters["original_max_position_embeddings"] = config.max_position_embeddings
    return parameters


def inverse_frequencies(config: Any, head_dim: int, max_model_len: int) -> tuple[torch.Tensor, float]:
    """float32 [rotary_dim / 2] on the CPU, and the factor of cosines and sines.

    `dynamic` scaling is that of max_model_len for all lengths: none up to max_position_embeddings.
    Raises ModelLoadError for a scaling that is not supported or lacks a parameter.
    """
    parameters = rope_parameters(config)
    kind = parameters["rope_type"]
    if kind not in SUPPORTED_ROPE_TYPES:
        raise ModelLoadError(f"rope_type={kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    if kind == "default":
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
        return 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_config = _RopeConfig(parameters, head_dim, config.max_position_embeddings, hidden_size=head_dim)
    compute: Any = ROPE_INIT_FUNCTIONS[kind]
    try:
        with torch.device("cpu"):
            inv_freq, factor = compute(rope_config, torch.device("cpu"), seq_len=max_model_len)
    except KeyError as error:
        raise ModelLoadError(f"rope_parameters of rope_type={kind!r} lack {error.args[0]!r}") from None
    return inv_freq.float(), factor


def get_rope(config: Any, head_dim: int, *, context: BuildContext) -> RotaryEmbedding:
    """The rotary embedding a config asks for. Raises ModelLoadError as `inverse_frequencies` does."""
    inv_freq, factor = inverse_frequencies(config, head_dim, context.max_model_len)
    # Built on the CPU, so that every platform rotates by the same angles.
    angles = torch.outer(torch.arange(context.max_model_len, dtype=torch.float32, device="cpu"), inv_freq)
    table = torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)
    return RotaryEmbedding(table.to(torch.get_default_device()), context=context)
