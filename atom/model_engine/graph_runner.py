"""Runs a step's forward: as CUDA graphs where the dispatcher says so, or as recorded on a CPU, or plainly."""

from collections.abc import Callable
from typing import Any

import torch

from atom.compilation.cuda_graph import GraphCapturer, PieceGraphs, without_ownership
from atom.compilation.recorded_steps import RecordedSteps
from atom.config import CUDAGraphMode
from atom.forward_context import ForwardContext, set_forward_context
from atom.layers.attention.base import AttentionMetadata, StepPlanner
from atom.model_engine.input_batch import StepInput
from atom.model_engine.static_inputs import StaticInputs

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class GraphRunner:
    """Replays find their arguments in the static inputs, where a step was written as it was prepared.

    Padding tokens have slot -1 and padding requests length 0; what they compute is cut off.
    """

    def __init__(
        self,
        forward: Forward,
        layers: dict[str, Any],
        inputs: StaticInputs | None,
        capturer: GraphCapturer,
        *,
        copy_inputs: bool,
        recorded: RecordedSteps | None = None,
    ) -> None:
        """inputs: None if there are no graphs; recorded: what replays a CPU's decodes, if anything."""
        self._forward = forward
        self._layers = layers
        self._planners = _share_planners(layers)
        self._inputs = inputs
        self._capturer = capturer
        self._recorded = recorded
        self._full: dict[tuple[bool, int], tuple[Callable[[], None], torch.Tensor]] = {}
        use_graphs = getattr(forward, "use_graphs", None)  # a CompiledModel's; importing that takes a second
        if use_graphs is not None:
            use_graphs(lambda: PieceGraphs(capturer, copy_inputs))

    def capture(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Capture all graphs of the dispatcher, the largest first; progress is told of each."""
        assert self._inputs is not None
        for kind, is_decode, size in self._inputs.dispatcher.captures():
            self._inputs.blank(size)
            if kind is CUDAGraphMode.FULL:
                self._capture_full(self._inputs, is_decode, size)
            else:
                inputs = self._inputs.on_device(size)
                # Without metadata attention touches no cache: it is not part of a piece's graph.
                with set_forward_context(ForwardContext(None, self._layers, size)):
                    self._forward(inputs.ids, inputs.positions)
            progress(1)

    def run(self, step: StepInput, only_sampled: bool = False) -> torch.Tensor:
        """hidden [T, H]; valid until the next step. only_sampled: may be [S, H], of the tokens sampled from."""
        metadata, graph = step.metadata, step.graph
        if graph is None:
            self._plan(metadata)
            rows = step.logits_indices if only_sampled and 0 < len(step.logits_indices) < len(step.input_ids) else None
            with set_forward_context(ForwardContext(metadata, self._layers, wanted_rows=rows)):
                if self._recorded is not None and self._recorded.takes(metadata):
                    return self._recorded.run(step.input_ids, step.positions, metadata)
                return self._forward(step.input_ids, step.positions)
        assert self._inputs is not None
        num_tokens, size = len(step.input_ids), graph.size
        if graph.kind is CUDAGraphMode.FULL:
            self._plan(metadata, size)
            replay, hidden = self._full[metadata.num_decodes == len(step.rows), size]
            replay()
            return hidden if num_tokens == size else hidden[:num_tokens]
        self._plan(metadata)
        self._inputs.resolve(size)
        inputs = self._inputs.on_device(size)
        metadata.slot_mapping = inputs.slots
        with set_forward_context(ForwardContext(metadata, self._layers, size)):
            return self._forward(inputs.ids, inputs.positions)[:num_tokens]

    def _plan(self, metadata: AttentionMetadata, graph_size: int = 0) -> None:
        for planner in self._planners:
            planner.plan(metadata, graph_size)

    def _capture_full(self, static: StaticInputs, is_decode: bool, size: int) -> None:
        inputs = static.on_device(size)
        num_requests = min(size, static.max_requests)
        starts = static.one_token_each if is_decode else inputs.starts
        metadata = AttentionMetadata(
            query_start_loc=starts[: num_requests + 1],
            seq_lens=inputs.seq_lens[:num_requests],
            block_table=static.block_table[:num_requests],
            slot_mapping=inputs.slots,
            num_decodes=size if is_decode else 0,
            max_query_len=1 if is_decode else size,
            max_seq_len=static.max_model_len,
        )

        def call() -> torch.Tensor:
            static.resolve(size)
            with set_forward_context(ForwardContext(metadata, self._layers)):
                return self._forward(inputs.ids, inputs.positions)

        self._plan(metadata, size)
        call()  # lazy initialization must not be captured
        replay, hidden = self._capturer.capture(call)
        self._full[is_decode, size] = (replay, without_ownership(hidden))


def _share_planners(layers: dict[str, Any]) -> list[StepPlanner]:
    """Give the layers with equal backends and specs one planner, and list them."""
    planners: dict[Any, StepPlanner | None] = {}
    for layer in layers.values():
        key = (layer.backend.name, layer.backend.spec)
        if key not in planners:
            planners[key] = layer.backend.make_planner()
        layer.backend.planner = planners[key]
    return [planner for planner in planners.values() if planner is not None]
