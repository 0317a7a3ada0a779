"""A traced model cut into pieces: what to call, on what, in what order. Plain data, stored as JSON."""

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from atom.compilation.trace import Trace


class Step(msgspec.Struct, kw_only=True):
    """One call. Registers are numbered; `piece` names a graph to compile, `op` a splitting op called as it is."""

    inputs: list[int]  # registers
    outputs: list[int]
    dead: list[int]  # registers nobody reads afterwards
    piece: str = ""
    op: str = ""
    constants: list[tuple[int, str | int | float | bool | None]] = []  # (argument index, value) of an op


class Plan(msgspec.Struct, kw_only=True):
    """inputs: (register, what it holds), see Trace.inputs; output: the register of the result."""

    num_registers: int
    inputs: list[tuple[int, str]]
    steps: list[Step]
    output: int


@dataclass(slots=True)
class Piece:
    """A graph without splitting ops. Equal pieces (the layers of a model) are one piece, compiled once."""

    key: str
    graph: fx.GraphModule
    example_inputs: list[Any]  # fake tensors and symbolic integers
    real_inputs: list[str]  # of its first use: paths of tensors, or "" for what is computed


def make_plan(trace: Trace, splitting_ops: list[str]) -> tuple[Plan, dict[str, Piece]]:
    """Cut the graph before and after each splitting op ("namespace.name"); no ops = one piece."""
    split = _split(trace.graph, set(splitting_ops))
    registers: dict[fx.Node, int] = {}
    results: dict[fx.Node, list[int]] = {}  # a submodule call -> registers of what it returns
    inputs: list[tuple[int, str]] = []
    steps: list[Step] = []
    pieces: dict[str, Piece] = {}
    paths: dict[int, str] = {}
    count = 0
    output = -1
    for node in split.graph.nodes:
        if node.op == "placeholder":
            what = trace.inputs[count]
            registers[node] = count
            inputs.append((count, what))
            paths[count] = what
            count += 1
        elif node.op == "call_module":
            module = split.get_submodule(node.target)
            used = [registers[arg] for arg in node.args]
            num_outputs = _num_outputs(module)
            results[node] = list(range(count, count + num_outputs))
            count += num_outputs
            if num_outputs == 1 and not _returns_tuple(module):
                registers[node] = results[node][0]
            op = _splitting_op(module, splitting_ops)
            if op is not None:
                steps.append(_op_step(module, op, used, results[node]))
            else:
                piece = _make_piece(module, [paths.get(r, "") for r in used])
                pieces.setdefault(piece.key, piece)
                steps.append(Step(inputs=used, outputs=results[node], dead=[], piece=piece.key))
        elif node.op == "call_function":  # operator.getitem of a submodule's results
            source, index = node.args
            registers[node] = results[source][index]
        elif node.op == "output":
            (value,) = node.args
            if isinstance(value, tuple | list):
                (value,) = value
            output = registers[value]
    plan = Plan(num_registers=count, inputs=inputs, steps=steps, output=output)
    _mark_dead(plan)
    return plan, pieces


def _split(graph: fx.GraphModule, splitting_ops: set[str]) -> fx.GraphModule:
    part, parts = 0, {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if _op_name(node) in splitting_ops:
            parts[node] = part + 1
            part += 2
        else:
            parts[node] = part
    return split_module(graph, None, lambda node: parts[node], keep_original_order=True)  # type: ignore[arg-type]


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.replace("::", ".")
    return ""


def _splitting_op(module: Any, splitting_ops: list[str]) -> fx.Node | None:
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    return calls[0] if len(calls) == 1 and _op_name(calls[0]) in splitting_ops else None


def _op_step(module: Any, op: fx.Node, used: list[int], outputs: list[int]) -> Step:
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    register = dict(zip(placeholders, used, strict=True))
    assert not op.kwargs
    inputs = [register[a] for a in op.args if isinstance(a, fx.Node)]
    constants = [(i, a) for i, a in enumerate(op.args) if not isinstance(a, fx.Node)]
    return Step(inputs=inputs, outputs=outputs, dead=[], op=_op_name(op), constants=constants)  # type: ignore[arg-type]


def _num_outputs(module: Any) -> int:
    (value,) = module.graph.output_node().args
    if isinstance(value, tuple | list):
        return len(value)
    return 0 if value is None else 1


def _returns_tuple(module: Any) -> bool:
    return isinstance(module.graph.output_node().args[0], tuple | list)


def _make_piece(module: Any, real_inputs: list[str]) -> Piece:
    """Rename the nodes by position, so that equal layers have equal code, and key the piece by its code."""
    for i, node in enumerate(module.graph.nodes):
        node._rename(f"v{i}")
        if node.op == "placeholder":
            node.target = node.name
            node.type = None
    module.recompile()
    if not _returns_tuple(module):
        output = module.graph.output_node()
        output.args = ((output.args[0],),)
        module.recompile()
    examples = [n.meta["example_value"] for n in module.graph.nodes if n.op == "placeholder"]
    described = [
        f"{tuple(e.shape)} {tuple(e.stride())} {e.dtype} {e.device}" if isinstance(e, torch.Tensor) else str(e)
        for e in examples
    ]
    text = module.code + "\n".join(described)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Piece(key, module, examples, real_inputs)


def _mark_dead(plan: Plan) -> None:
    kept = {register for register, _ in plan.inputs} | {plan.output}
    for step in reversed(plan.steps):
        step.dead = [r for r in dict.fromkeys(step.inputs + step.outputs) if r not in kept]
        kept.update(step.dead)
