"""The tensors and metadata of one step, scoped; cannot nest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from atom.layers.attention.base import AttentionMetadata


@dataclass(slots=True)
class ForwardContext:
    """What layers may look up while a model runs.

    attn_metadata: how this step's tokens map to requests and cache slots; None in a
        profiling run, where attention writes zeros and touches no cache.
    layers: attention layers by name, so that a custom op can find its caches.
    graph_size: tokens the batch is padded to, when pieces run as CUDA graphs; 0 = they don't.
    wanted_rows: int64 [S], the tokens whose results are asked for: from where tokens no longer read each other, a model
        may leave out the rest. None: all.
    """

    attn_metadata: "AttentionMetadata | None"
    layers: dict[str, Any] = field(default_factory=dict)
    graph_size: int = 0
    wanted_rows: "torch.Tensor | None" = None


_current: ForwardContext | None = None


def get_forward_context() -> ForwardContext:
    assert _current is not None, "no forward context: wrap the model call in set_forward_context()"
    return _current


@contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[None]:
    global _current
    assert _current is None, "forward contexts cannot nest"
    _current = context
    try:
        yield
    finally:
        _current = None
