"""The compilation levels: from a model to something that is called like it and runs compiled pieces."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atom.compilation.cache import CompilationCache, Manifest
from atom.compilation.inductor import Compiled, compile_piece, load_piece
from atom.compilation.plan import Piece, Plan, make_plan
from atom.compilation.trace import tensor_at, trace_model
from atom.forward_context import get_forward_context
from atom.layers.attention.layer import unified_attention_with_output
from atom.utils import startup
from atom.utils.logging import get_logger

logger = get_logger(__name__)

# Runs a call of a piece as a CUDA graph, see cuda_graph.PieceGraphs: (call, arguments) -> results.
Replayer = Callable[[Compiled, list[Any]], Any]


class CompiledModel:
    """Runs a plan: forward(input_ids [T], positions [T]) -> hidden [T, H], like the model it was made from."""

    def __init__(self, model: nn.Module, plan: Plan, pieces: dict[str, dict[int | None, Compiled]]) -> None:
        self._registers: list[Any] = [None] * plan.num_registers
        self._output = plan.output
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._num_tokens: list[int] = []
        slots = {"input_ids": self._ids, "positions": self._positions, "num_tokens": self._num_tokens}
        for register, what in plan.inputs:
            if what in slots:
                slots[what].append(register)
            else:
                self._registers[register] = tensor_at(model, what)
        self._steps = [
            (_resolve(step.piece, step.op, pieces), step.inputs, step.outputs, step.dead, sorted(step.constants))
            for step in plan.steps
        ]
        self._is_piece = [bool(step.piece) for step in plan.steps]
        self._replayers: list[Replayer | None] = [None] * len(plan.steps)

    def use_graphs(self, make_replayer: Callable[[], Replayer]) -> None:
        """Run each call of a piece through a replayer of its own whenever the forward context has a graph size."""
        self._replayers = [make_replayer() if is_piece else None for is_piece in self._is_piece]

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        registers = self._registers.copy()
        num_tokens = input_ids.shape[0]
        given: list[tuple[list[int], Any]] = [
            (self._ids, input_ids),
            (self._positions, positions),
            (self._num_tokens, num_tokens),
        ]
        for slots, value in given:
            for register in slots:
                registers[register] = value
        graph_size = get_forward_context().graph_size
        for (by_size, inputs, outputs, dead, constants), replayer in zip(self._steps, self._replayers, strict=True):
            args = [registers[i] for i in inputs]
            for index, constant in constants:
                args.insert(index, constant)
            call = by_size.get(num_tokens) or by_size[None]
            results = replayer(call, args) if graph_size and replayer is not None else call(*args)
            for register, result in zip(outputs, results or (), strict=True):
                registers[register] = result
            for register in dead:
                registers[register] = None
        return registers[self._output]


def compile_model(
    model: nn.Module,
    device: torch.device,
    *,
    splitting_ops: list[str],
    sizes: list[int],
    use_inductor: bool,
    inductor_options: dict[str, Any],
    cache: CompilationCache | None,
    debug_dump: str = "",
) -> CompiledModel:
    """Trace once, split, compile each distinct piece; or, with a good cache, just load what was compiled.

    sizes: numbers of tokens to compile for exactly, beside the general code. Raises CompilationError.
    """
    started = time.perf_counter()
    if cache is not None and use_inductor and (manifest := cache.load()) is not None:
        loaded = _load(model, cache, manifest)
        if loaded is not None:
            if debug_dump:
                _dump(Path(debug_dump), manifest.plan, manifest.graphs)
            logger.info("compiled model loaded from %s in %.1f s", cache.directory, time.perf_counter() - started)
            startup.note("compile", "every piece from the cache")
            return loaded
    with startup.phase("trace"):
        plan, pieces = make_plan(trace_model(model, device), splitting_ops)
    logger.info(
        "traced in %.1f s: %d calls of %d distinct pieces", time.perf_counter() - started, len(plan.steps), len(pieces)
    )
    graphs = {key: _readable(piece) for key, piece in pieces.items()}
    if debug_dump:
        _dump(Path(debug_dump), plan, graphs)
    if not use_inductor:
        return CompiledModel(model, plan, {key: {None: piece.graph} for key, piece in pieces.items()})
    startup.note("compile", f"{len(pieces) * (1 + len(sizes))} pieces, none from the cache")
    building = cache.start() if cache is not None else None
    compiled: dict[str, dict[int | None, Compiled]] = {}
    for number, (key, piece) in enumerate(pieces.items(), start=1):
        piece_started = time.perf_counter()
        compiled[key] = {}
        for size in [None, *sizes]:
            path = None if building is None else str(building / f"{key}.{size or 'any'}.bin")
            compiled[key][size] = compile_piece(piece, size, inductor_options, path)
        logger.info(
            "compiled piece %d of %d (%s) in %.1f s", number, len(pieces), key, time.perf_counter() - piece_started
        )
    if cache is not None and building is not None:
        cache.finish(building, plan, graphs)
    return CompiledModel(model, plan, compiled)


def _load(model: nn.Module, cache: CompilationCache, manifest: Manifest) -> CompiledModel | None:
    pieces: dict[str, dict[int | None, Compiled]] = {}
    try:
        for name in manifest.files:
            key, size, _ = name.split(".")
            pieces.setdefault(key, {})[None if size == "any" else int(size)] = load_piece(str(cache.directory / name))
        return CompiledModel(model, manifest.plan, pieces)
    except Exception as error:  # torch raises what it likes for an artifact of another build
        logger.warning("compilation cache %s does not load and will be rebuilt: %s", cache.directory, error)
        return None


def _resolve(piece: str, op: str, pieces: dict[str, dict[int | None, Compiled]]) -> dict[int | None, Compiled]:
    if piece:
        return pieces[piece]
    if op == "aiter.unified_attention_with_output":
        return {None: unified_attention_with_output}  # as it is: torch's dispatcher would only call it
    namespace, name = op.split(".")
    return {None: getattr(getattr(torch.ops, namespace), name).default}


def _readable(piece: Piece) -> str:
    described = zip(piece.example_inputs, piece.real_inputs, strict=True)
    inputs = "\n".join(f"# v{i}: {e} {p}" for i, (e, p) in enumerate(described))
    return f"{inputs}\n{piece.graph.code}"


def _dump(directory: Path, plan: Plan, graphs: dict[str, str]) -> None:
    """The plan and each piece's graph as readable code."""
    import msgspec

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
    for key, text in graphs.items():
        (directory / f"piece_{key}.py").write_text(text)
