"""Collectives over a tensor-parallel group."""

import torch

from atom.distributed.parallel_state import TPGroup


def all_reduce(x: torch.Tensor, group: TPGroup) -> torch.Tensor:
    """The sum of x over the group's ranks."""
    if group.size == 1:
        return x
    raise NotImplementedError("tensor parallelism over several ranks has no collectives yet")


def all_gather_last(x: torch.Tensor, group: TPGroup) -> torch.Tensor:
    """All ranks' x side by side in the last dimension, in rank order."""
    if group.size == 1:
        return x
    raise NotImplementedError("tensor parallelism over several ranks has no collectives yet")
