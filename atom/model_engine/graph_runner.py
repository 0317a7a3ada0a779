"""Runs a step's forward: padded and replayed as CUDA graphs where the dispatcher says so, plainly elsewhere."""

from collections.abc import Callable
from typing import Any

import torch

from atom.compilation.cuda_graph import Dispatch, GraphCapturer, GraphDispatcher, PieceGraphs, without_ownership
from atom.config import CUDAGraphMode
from atom.forward_context import ForwardContext, set_forward_context
from atom.layers.attention.base import AttentionMetadata, StepPlanner
from atom.model_engine.input_batch import StepInput

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class GraphRunner:
    """Owns the static inputs that graphs read: every replay finds its arguments at the same addresses.

    Padding tokens have slot -1 and padding requests length 0; what they compute is cut off.
    """

    def __init__(
        self,
        forward: Forward,
        layers: dict[str, Any],
        dispatcher: GraphDispatcher,
        capturer: GraphCapturer,
        *,
        max_model_len: int,
        block_size: int,
        copy_inputs: bool,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._layers = layers
        self._planners = _share_planners(layers)
        self.dispatcher = dispatcher
        self._capturer = capturer
        self._max_model_len = max_model_len
        self._full: dict[tuple[bool, int], tuple[Callable[[], None], torch.Tensor]] = {}
        largest = max(dispatcher.sizes, default=0)
        max_blocks = -(-max_model_len // block_size)
        self.input_ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self.positions = torch.zeros(largest, dtype=torch.int64, device=device)
        self.slot_mapping = torch.full((largest,), -1, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(largest, dtype=torch.int32, device=device)
        self.query_start_loc = torch.zeros(largest + 1, dtype=torch.int32, device=device)
        self.one_token_each = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(largest, max_blocks, dtype=torch.int32, device=device)
        use_graphs = getattr(forward, "use_graphs", None)  # a CompiledModel's; importing that takes a second
        if use_graphs is not None:
            use_graphs(lambda: PieceGraphs(capturer, copy_inputs))

    def capture(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Capture all graphs of the dispatcher, the largest first; progress is told of each."""
        for kind, is_decode, size in self.dispatcher.captures():
            if kind is CUDAGraphMode.FULL:
                self._capture_full(is_decode, size)
            else:
                # Without metadata attention touches no cache: it is not part of a piece's graph.
                with set_forward_context(ForwardContext(None, self._layers, size)):
                    self._forward(self.input_ids[:size], self.positions[:size])
            progress(1)

    def run(self, step: StepInput) -> torch.Tensor:
        """hidden [T, H]; valid until the next step."""
        metadata = step.metadata
        num_tokens = step.input_ids.shape[0]
        choice = self.dispatcher.dispatch(num_tokens, metadata.num_decodes == len(step.rows))
        if choice.kind is CUDAGraphMode.NONE:
            self._plan(metadata)
            with set_forward_context(ForwardContext(metadata, self._layers)):
                return self._forward(step.input_ids, step.positions)
        self._fill_tokens(step, choice)
        if choice.kind is CUDAGraphMode.FULL:
            self._fill_requests(metadata, choice.size)
            self._plan(metadata, choice.size)
            replay, hidden = self._full[metadata.num_decodes == len(step.rows), choice.size]
            replay()
            return hidden[:num_tokens]
        self._plan(metadata)
        metadata.slot_mapping = self.slot_mapping[: choice.size]
        with set_forward_context(ForwardContext(metadata, self._layers, choice.size)):
            return self._forward(self.input_ids[: choice.size], self.positions[: choice.size])[:num_tokens]

    def _plan(self, metadata: AttentionMetadata, graph_size: int = 0) -> None:
        for planner in self._planners:
            planner.plan(metadata, graph_size)

    def _capture_full(self, is_decode: bool, size: int) -> None:
        self.slot_mapping.fill_(-1)
        self.seq_lens.zero_()
        starts = self.one_token_each if is_decode else self.query_start_loc
        metadata = AttentionMetadata(
            query_start_loc=starts[: size + 1],
            seq_lens=self.seq_lens[:size],
            block_table=self.block_table[:size],
            slot_mapping=self.slot_mapping[:size],
            num_decodes=size if is_decode else 0,
            max_query_len=1 if is_decode else size,
            max_seq_len=self._max_model_len,
        )

        def call() -> torch.Tensor:
            with set_forward_context(ForwardContext(metadata, self._layers)):
                return self._forward(self.input_ids[:size], self.positions[:size])

        self._plan(metadata, size)
        call()  # lazy initialization must not be captured
        replay, hidden = self._capturer.capture(call)
        self._full[is_decode, size] = (replay, without_ownership(hidden))

    def _fill_tokens(self, step: StepInput, choice: Dispatch) -> None:
        num_tokens, size = step.input_ids.shape[0], choice.size
        self.input_ids[:num_tokens].copy_(step.input_ids)
        self.positions[:num_tokens].copy_(step.positions)
        self.slot_mapping[:num_tokens].copy_(step.metadata.slot_mapping)
        if num_tokens < size:
            self.slot_mapping[num_tokens:size].fill_(-1)
            # Stale tokens and positions are as good as any: what they give is cut off.

    def _fill_requests(self, metadata: AttentionMetadata, size: int) -> None:
        num_requests, num_columns = metadata.block_table.shape
        self.seq_lens[:num_requests].copy_(metadata.seq_lens)
        self.block_table[:num_requests, :num_columns].copy_(metadata.block_table)
        if num_requests < size:
            self.seq_lens[num_requests:size].zero_()
        if metadata.num_decodes != num_requests:
            self.query_start_loc[: num_requests + 1].copy_(metadata.query_start_loc)
            # Requests that don't exist start, and end, where the last one ends.
            self.query_start_loc[num_requests + 1 : size + 1] = metadata.query_start_loc[-1]


def _share_planners(layers: dict[str, Any]) -> list[StepPlanner]:
    """Give the layers with equal backends and specs one planner, and list them."""
    planners: dict[Any, StepPlanner | None] = {}
    for layer in layers.values():
        key = (layer.backend.name, layer.backend.spec)
        if key not in planners:
            planners[key] = layer.backend.make_planner()
        layer.backend.planner = planners[key]
    return [planner for planner in planners.values() if planner is not None]
