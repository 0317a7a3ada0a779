"""Decodes on a CPU: recorded once for a number of requests, then replayed without Python, like CUDA graphs.

A replay needs no padding, as recording costs little more than a step. It holds the calls of the C++ kernels alone, so
that a model with other ops is not recorded.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from atom.layers.attention.base import AttentionMetadata
from atom.utils.logging import get_logger

if TYPE_CHECKING:
    from atom.kernels.cpu.recording import Recorded

logger = get_logger(__name__)


class RecordedSteps:
    """The recordings of an engine by their number of requests, one token each.

    forward: the model itself, whatever the level: compiled code has the same calls and hides them.
    """

    def __init__(self, forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], largest: int) -> None:
        from atom.kernels.cpu.recording import Recorder, StepTensors  # needs the built kernels

        self.largest = largest
        self._forward = forward
        self._recorder = Recorder()
        self._inputs = StepTensors
        self._recorded: dict[int, Recorded] = {}
        self._is_possible = True

    def takes(self, metadata: AttentionMetadata) -> bool:
        """Whether `run` is for this step."""
        return self._is_possible and metadata.max_query_len == 1 and metadata.num_decodes <= self.largest

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """hidden [T, H], valid until the next step. The forward context is the step's."""
        inputs = self._inputs(
            input_ids,
            positions,
            metadata.slot_mapping,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
        )
        found = self._recorded.get(len(input_ids))
        if found is not None:
            return found.replay(inputs)
        hidden, recorded = self._recorder.record(lambda: self._forward(input_ids, positions), inputs)
        if isinstance(recorded, str):
            logger.debug("decodes are not recorded: %s", recorded)
            self._is_possible = False
        else:
            self._recorded[len(input_ids)] = recorded
        return hidden
