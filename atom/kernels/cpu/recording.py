"""A step's kernel calls, recorded as they happen and run again in one call: what a CUDA graph is to a GPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atom.kernels.cpu.ops import fast

_new_empty, _replay = fast.new_empty, fast.replay


class StepTensors(NamedTuple):
    """All that changes from step to step. Shapes are those of the recorded step, but for the table's columns.

    input_ids, positions, slots: int64 [T]; query_start: int32 [R + 1]; seq_lens: int32 [R]; block_table: int32 [R, B].
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class Recorded:
    """A step to run again; the output is the same memory each time, and other steps of its recorder reuse it."""

    def __init__(self, tape: Any, output: torch.Tensor) -> None:
        self._tape = tape
        self._output = output

    def replay(self, inputs: StepTensors) -> torch.Tensor:
        """RuntimeError, and nothing is done, if an id is not in the vocabulary."""
        _replay(self._tape, *inputs)
        return self._output


class Recorder:
    """Its recordings share one arena of memory, as only one runs at a time."""

    def __init__(self) -> None:
        self._arena = fast.make_arena()

    def record(self, call: Callable[[], torch.Tensor], inputs: StepTensors) -> tuple[torch.Tensor, Recorded | str]:
        """(result of the call, its recording, or why it can't be replayed).

        Parameters, caches and constants that the call reads must stay where they are.
        """
        watch = _Watch()
        tape = fast.start_recording(self._arena)
        try:
            with watch:
                output = call()
        finally:
            fast.stop_recording()
        if watch.foreign is not None:
            return output, f"{watch.foreign} is not one of the CPU kernels"
        if not fast.tape_reads(tape, *inputs):
            return output, "it reads a step's inputs elsewhere"
        return output, Recorded(tape, fast.borrow(output))


class _Watch(TorchDispatchMode):
    """Gives torch's allocations memory of the recording, and notes the first op that computes outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to be skipped imports Dynamo, for 1.5 s

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs is None or not any(kwargs.values()):  # of the type and on the device of what is given
            if func is torch.ops.aten.new_empty.default:
                return _new_empty(*args)
            if func is torch.ops.aten.empty_like.default:
                return _new_empty(args[0], tuple(args[0].shape))
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view and _are_views(result, args[0])
        if not is_view and func.namespace != "atom_cpu":
            self.foreign = self.foreign or str(func)
        return result


def _are_views(result: Any, base: Any) -> bool:
    """Whether nothing was computed; `reshape` and `contiguous`, by name views, may have copied."""
    tensors = result if isinstance(result, list | tuple) else (result,)
    if not isinstance(base, torch.Tensor) or not all(isinstance(t, torch.Tensor) for t in tensors):
        return False
    memory = base.untyped_storage().data_ptr()
    return all(t.untyped_storage().data_ptr() == memory for t in tensors)
