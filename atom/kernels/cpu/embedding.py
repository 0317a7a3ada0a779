"""Look-up of token embeddings in C++."""

import torch
from torch.compiler import is_compiling

from atom.kernels.cpu.ops import fast, ops
from atom.kernels.torch import embedding as reference

_embedding, _op_embedding = fast.embedding, ops.embedding.default


def embedding(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the reference."""
    if is_compiling():
        return _op_embedding(input_ids, weight)
    out = _embedding(input_ids, weight)
    return reference.embedding(input_ids, weight) if out is NotImplemented else out
