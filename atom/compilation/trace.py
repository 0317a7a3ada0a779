"""Capturing a model's forward as one graph with a symbolic number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from atom.utils.errors import AtomError

_TRACED_TOKENS = 8  # any number but 0 and 1, which tracing would treat as constants


class CompilationError(AtomError):
    """torch could not trace or compile a part of the model; the message names the part."""


@dataclass(slots=True)
class Trace:
    """A captured graph. inputs says what each placeholder is, in order:

    "input_ids", "positions", "num_tokens", or the path of one of the model's tensors.
    """

    graph: fx.GraphModule
    inputs: list[str]


class _Captured(Exception):
    """Leaves the traced call once its graph and its real arguments are known."""


def trace_model(model: nn.Module, device: torch.device) -> Trace:
    """Trace model(input_ids int64 [T], positions int64 [T]) for any T; nothing is executed."""
    found: dict[str, Any] = {}

    def backend(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.update(graph=graph, args=args)
            raise _Captured

        return run

    input_ids, positions = (torch.zeros(_TRACED_TOKENS, dtype=torch.int64, device=device) for _ in range(2))
    for tensor in (input_ids, positions):
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.reset()
    # Attribute look-ups make hundreds of guards, and nothing they guard can change.
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    traced = torch.compile(model.forward, backend=backend, fullgraph=True, options=options)
    try:
        with torch.no_grad():
            traced(input_ids, positions)
    except _Captured:
        pass
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CompilationError(f"tracing {type(model).__name__} failed: {_first_line(error)}") from error
    assert found, "the model's forward made no graph"
    names = {**tensor_paths(model), id(input_ids): "input_ids", id(positions): "positions"}
    inputs = []
    for arg in found["args"]:
        if isinstance(arg, int):
            inputs.append("num_tokens")
        elif id(arg) in names:
            inputs.append(names[id(arg)])
        else:
            raise CompilationError(f"{type(model).__name__}: the graph reads a tensor that is not part of the model")
    return Trace(found["graph"], inputs)


def tensor_paths(model: nn.Module) -> dict[int, str]:
    """id -> path of every tensor of the model: parameters, buffers and plain attributes."""
    paths: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]:
            if isinstance(value, torch.Tensor):
                paths.setdefault(id(value), f"{prefix}.{name}" if prefix else name)
    return paths


def tensor_at(model: nn.Module, path: str) -> torch.Tensor:
    """The inverse of `tensor_paths`."""
    prefix, _, name = path.rpartition(".")
    value = getattr(model.get_submodule(prefix), name)
    assert isinstance(value, torch.Tensor), path
    return value


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
