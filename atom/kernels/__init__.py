"""One table says which op runs where.

Every op has a torch reference in `kernels/torch/`, which defines its meaning. A faster backend
(`cpu` in C++, `triton`) may implement any subset under the same name and signature; layers ask for
an op once, when they are built, with `get_op(name)`.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from atom.platforms import current_platform

logger = logging.getLogger(__name__)

# op -> module below atom/kernels/<backend>/ that holds it, under the same name in every backend
OPS: dict[str, str] = {
    "embedding": "embedding",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "silu_and_mul": "activation",
    "quantize": "quant",
    "rms_norm_quant": "quant",
    "add_rms_norm_quant": "quant",
    "silu_and_mul_quant": "quant",
    "rotary_embedding_": "rotary",
    "store_kv": "kv_cache",
    "qk_norm_rope_cache": "qkv",
    "paged_attention": "attention",
    "prepare_linear_weight": "linear",
    "linear": "linear",
    "linear_argmax": "linear",
    "prepare_silu_linear_weight": "linear",
    "linear_silu_and_mul": "linear",
    "rms_norm_linear": "linear",
    "rms_norm_linear_silu_and_mul": "linear",
    "prepare_quant_weight": "quant_linear",
    "quant_linear": "quant_linear",
    "route_experts": "routing",
    "fused_experts": "moe",
    "greedy": "sampling",
    "sample": "sampling",
}


@cache
def unavailable_reason(backend: str) -> str | None:
    """Why a backend can't run here, or None; asking for the C++ backend builds it."""
    return importlib.import_module(f"atom.kernels.{backend}").unavailable_reason()


@cache
def _is_usable(backend: str) -> bool:
    reason = unavailable_reason(backend)
    if reason:
        logger.warning("kernels: the %s backend is off (%s); torch references are used instead", backend, reason)
    return reason is None


def get_op(name: str, backends: tuple[str, ...] | None = None) -> Callable[..., Any]:
    """The best implementation of an op among `backends` (default: the platform's order)."""
    for backend in backends or current_platform().kernel_backends:
        if not _is_usable(backend):
            continue
        try:
            module = importlib.import_module(f"atom.kernels.{backend}.{OPS[name]}")
        except ModuleNotFoundError as error:
            if error.name != f"atom.kernels.{backend}.{OPS[name]}":
                raise
            continue
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(f"no backend implements op {name!r}")
