"""Choosing tokens in C++, a row a thread."""

import torch

from atom.kernels.cpu.ops import fast
from atom.kernels.torch import sampling as reference

_argmax, _sample = fast.argmax, fast.sample


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """As the reference."""
    out = _argmax(logits)
    return reference.greedy(logits) if out is NotImplemented else out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """As the reference, but for rounding: a filter may treat tokens as tied that differ in the last bit."""
    out = _sample(logits, temperature, top_k, top_p, min_p, uniform)
    if out is NotImplemented:
        return reference.sample(logits, temperature, top_k, top_p, min_p, uniform)
    return out
