"""Look-up of token embeddings."""

import torch
import torch.nn.functional as F


def embedding(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of weight [V, H] at input_ids, int64 [T] within 0..V-1 -> [T, H]."""
    return F.embedding(input_ids, weight)
