"""ATOM: a lightweight LLM inference engine.

Importing this package loads nothing heavy; the public names are resolved on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "LLM": "atom.entrypoints.llm",
    "LLMEngine": "atom.model_engine.llm_engine",
    "SamplingParams": "atom.sampling_params",
}

if TYPE_CHECKING:
    from atom.entrypoints.llm import LLM as LLM
    from atom.model_engine.llm_engine import LLMEngine as LLMEngine
    from atom.sampling_params import SamplingParams as SamplingParams

__all__ = ["LLM", "LLMEngine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'atom' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
