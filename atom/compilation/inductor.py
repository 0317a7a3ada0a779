"""Inductor, one piece at a time: compile, save, load."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor

from atom.compilation.plan import Piece
from atom.compilation.trace import CompilationError

Compiled = Callable[..., Any]

# Tracing knew the results of our own ops; a check of each in every call takes longer than a small kernel.
_DEFAULTS = {"size_asserts": False, "alignment_asserts": False}


def compile_piece(piece: Piece, size: int | None, options: dict[str, Any], save_to: str | None) -> Compiled:
    """Compile for any number of tokens (size None) or for exactly one; save the artifact when asked.

    Raises CompilationError naming the piece.
    """
    examples = piece.example_inputs if size is None else [_at_size(e, size) for e in piece.example_inputs]
    try:
        artifact = torch._inductor.standalone_compile(
            piece.graph,
            examples,
            dynamic_shapes="from_graph" if size is None else "from_example_inputs",
            options={"config_patches": {**_DEFAULTS, **options}},
        )
    except Exception as error:
        what = f"piece {piece.key}" + (f" at {size} tokens" if size else "")
        line = next((s.strip() for s in str(error).splitlines() if s.strip()), type(error).__name__)
        raise CompilationError(f"Inductor failed on {what} (first inputs: {piece.real_inputs[:3]}): {line}") from error
    if save_to is not None:
        artifact.save(path=save_to, format="binary")
    return artifact


def load_piece(path: str) -> Compiled:
    """The artifact that compile_piece saved. Anything may be raised when it is stale or damaged."""
    return torch._inductor.CompiledArtifact.load(path=path, format="binary")


def use_cache_directory(path: str) -> None:
    """Keep Inductor's and Triton's own caches below `path`, so that a second start finds them."""
    os.makedirs(path, exist_ok=True)
    torch._inductor.config.fx_graph_cache = True
    torch._functorch.config.enable_autograd_cache = True


def _at_size(example: Any, size: int) -> Any:
    if isinstance(example, torch.SymInt):
        return size
    if isinstance(example, torch.Tensor):
        shape = [size if isinstance(d, torch.SymInt) else d for d in example.shape]
        return torch.empty(shape, dtype=example.dtype, device=example.device)
    return example
