"""Backends by name, and which one serves a layer."""

import importlib

from atom.layers.attention.base import AttentionBackend, AttentionSpec
from atom.platforms import current_platform
from atom.utils.errors import ConfigError
from atom.utils.logging import get_logger, log_once

logger = get_logger(__name__)

# name -> class below atom/layers/attention/backends, imported when chosen
_BACKENDS = {
    "cpu": "cpu.CpuAttentionBackend",
    "torch": "torch.TorchAttentionBackend",
    "triton": "triton.TritonAttentionBackend",
    # By name alone: auto stays with kernels that every installation has, tests run and benchmarks measured.
    "flashinfer": "flashinfer.FlashInferAttentionBackend",
    "aiter": "aiter.AiterAttentionBackend",
}


def get_backend(name: str) -> type[AttentionBackend]:
    """The backend class called `name`; ConfigError when there is none."""
    if name not in _BACKENDS:
        raise ConfigError(f"attention_backend={name!r} is unknown; use auto or one of {', '.join(_BACKENDS)}")
    module, _, attribute = _BACKENDS[name].partition(".")
    return getattr(importlib.import_module(f"atom.layers.attention.backends.{module}"), attribute)


def select_backend(name: str, spec: AttentionSpec, device_type: str) -> type[AttentionBackend]:
    """The backend asked for, or for "auto" the platform's first that has no reason against it.

    Raises ConfigError with the reasons when the one asked for can't serve the layer.
    """
    if name != "auto":
        backend = get_backend(name)
        reasons = backend.unsupported_reasons(spec, device_type)
        if reasons:
            raise ConfigError(f"attention_backend={name!r} can't be used: {'; '.join(reasons)}")
        return backend
    for candidate in current_platform().attention_backends:
        backend = get_backend(candidate)
        reasons = backend.unsupported_reasons(spec, device_type)
        if not reasons:
            log_once(logger, "attention backend: %s", candidate, level=20)
            return backend
        log_once(logger, "attention backend %s is not used: %s", candidate, "; ".join(reasons), level=10)
    raise AssertionError("the torch backend supports everything")
