"""CUDA graphs: which one serves a batch, and capturing and replaying calls.

The choice is plain arithmetic and knows no device. Capturing is behind `GraphCapturer`, so that all but the
two calls that need a GPU is the same everywhere.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atom.config import CUDAGraphMode
from atom.forward_context import get_forward_context


@dataclass(frozen=True, slots=True)
class Dispatch:
    """kind: NONE, PIECEWISE or FULL; size: tokens the batch is padded to (its own number with NONE)."""

    kind: CUDAGraphMode
    size: int


class GraphDispatcher:
    """Picks by batch: a uniform decode runs as `decode_mode` says, anything else as `mixed_mode` says.

    prompt_sizes: further ones, more tokens than a decode can have.
    """

    def __init__(self, mode: CUDAGraphMode, sizes: Sequence[int], prompt_sizes: Sequence[int] = ()) -> None:
        self.mode = mode
        self.sizes = sorted(sizes)
        self.mixed_sizes = sorted({*sizes, *prompt_sizes})

    @property
    def largest(self) -> int:
        return self.mixed_sizes[-1] if self.mixed_sizes else 0

    def dispatch(self, num_tokens: int, is_decode: bool) -> Dispatch:
        """is_decode: every request has one token, so that num_tokens is the number of requests."""
        kind = self.mode.decode_mode() if is_decode else self.mode.mixed_mode()
        sizes = self.sizes if is_decode else self.mixed_sizes
        at = bisect.bisect_left(sizes, num_tokens)
        if kind is CUDAGraphMode.NONE or at == len(sizes):
            return Dispatch(CUDAGraphMode.NONE, num_tokens)
        return Dispatch(kind, sizes[at])

    def captures(self) -> list[tuple[CUDAGraphMode, bool, int]]:
        """What to capture, (kind, is_decode, size), the largest first: smaller ones then fit into its memory."""
        decode, mixed = self.mode.decode_mode(), self.mode.mixed_mode()
        wanted = [(decode, True, size) for size in self.sizes]
        # Pieces know nothing of requests: one capture serves decodes and mixed batches.
        shared = self.sizes if mixed is decode and mixed is not CUDAGraphMode.FULL else []
        wanted += [(mixed, False, size) for size in self.mixed_sizes if size not in shared]
        wanted.sort(key=lambda capture: -capture[2])
        return [capture for capture in wanted if capture[0] is not CUDAGraphMode.NONE]


def capturable_mode(mode: CUDAGraphMode, whole: bool, mixed: bool) -> CUDAGraphMode:
    """What is left of a mode. whole: attention can be part of a graph; mixed: in batches with prompts as well."""
    if not whole and mode.has_full_cudagraphs():
        return mode.mixed_mode() if mode.mixed_mode() is CUDAGraphMode.PIECEWISE else CUDAGraphMode.NONE
    if not mixed and mode is CUDAGraphMode.FULL:
        return CUDAGraphMode.FULL_DECODE_ONLY
    return mode


class GraphCapturer(ABC):
    """Records the device work of a call."""

    @abstractmethod
    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, what the call returned: memory that every replay fills anew)"""


class CudaGraphCapturer(GraphCapturer):
    """All graphs share one memory pool; results are handed out without owning their memory in it."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = call()
        return graph.replay, result


class NoCapturer(GraphCapturer):
    """For platforms without graphs, where nothing is ever dispatched to one."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        raise AssertionError("this platform has no graphs")


def make_capturer(has_graphs: bool) -> GraphCapturer:
    return CudaGraphCapturer() if has_graphs else NoCapturer()


def without_ownership(value: Any) -> Any:
    """The same tensors as views that keep no memory alive, so that later captures may reuse it."""
    if isinstance(value, torch.Tensor):
        return _alias(value) if value.is_cuda else value
    if isinstance(value, list | tuple):
        return [without_ownership(v) for v in value]
    return value


class PieceGraphs:
    """The captured graphs of one call of one piece, by size.

    A replay reads the addresses it was captured with, which are the results of the pieces before it and the
    static inputs. With copy_inputs it reads buffers of its own instead, filled before each replay.
    """

    def __init__(self, capturer: GraphCapturer, copy_inputs: bool) -> None:
        self._capturer = capturer
        self._copy_inputs = copy_inputs
        self._captured: dict[int, tuple[Callable[[], None], Any, list[Any]]] = {}

    def __call__(self, call: Callable[..., Any], args: list[Any]) -> Any:
        size = get_forward_context().graph_size
        found = self._captured.get(size)
        if found is None:
            return self._capture(size, call, args)
        replay, results, inputs = found
        if self._copy_inputs:
            for buffer, value in zip(inputs, args, strict=True):
                if isinstance(value, torch.Tensor) and buffer is not value:
                    buffer.copy_(value)
        replay()
        return results

    def _capture(self, size: int, call: Callable[..., Any], args: list[Any]) -> Any:
        inputs = [a.clone() if _is_activation(a, size) else a for a in args] if self._copy_inputs else args
        call(*inputs)  # lazy initialization must not be captured
        replay, results = self._capturer.capture(lambda: call(*inputs))
        replay()
        kept = inputs if self._copy_inputs else []
        self._captured[size] = (replay, without_ownership(results), kept)
        return results


def _is_activation(value: Any, size: int) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and value.shape[:1] == (size,)


class _Memory:
    """Lets torch wrap an address it does not own, through the CUDA array interface."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes(),),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "version": 3,
        }


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    raw = torch.as_tensor(_Memory(tensor), device=tensor.device)
    usable = raw[: raw.numel() // tensor.element_size() * tensor.element_size()]
    return usable.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
