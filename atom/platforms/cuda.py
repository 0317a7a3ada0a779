"""NVIDIA GPUs."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from atom.platforms.base import Fence, Platform

_RESULT_BYTES = 1 << 13  # of a host buffer for a step's tokens, at least


class CudaFence(Fence):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record(self._stream)

    def is_passed(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()


class CudaPlatform(Platform):
    name = "cuda"
    device_type = "cuda"
    kernel_backends = ("triton", "torch")
    attention_backends = ("triton", "torch")
    has_graphs = True
    _allocated_before = 0

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info()
        return free, total

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def chip(self) -> str:
        return f"{self.name} {torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"

    def describe(self) -> str:
        free, total = self.memory()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"

    def reset_peak_memory(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._allocated_before = torch.cuda.memory_allocated()

    def peak_memory(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated() - self._allocated_before

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Steps run on one stream, which is looked up once: torch takes longer for that than for a small copy."""
        return torch.cuda.current_stream()

    def make_fence(self) -> CudaFence:
        return CudaFence(self._stream)

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy_to_host(self, tensors: Sequence[torch.Tensor | None]) -> Callable[[], list[torch.Tensor | None]]:
        if any(t is not None for t in tensors[1:]):
            return self._copy_anew(tensors)
        first = tensors[0]
        assert first is not None
        # A buffer is free again once its result was taken; one whose result nobody takes is lost to garbage.
        size = first.numel() * first.element_size()
        if self._result_buffers and len(self._result_buffers[-1][0]) >= size:
            buffer, done = self._result_buffers.pop()
        else:
            buffer, done = self.host_buffer(max(size, _RESULT_BYTES)), self.make_fence()
        copy = buffer[:size].view(first.dtype).view(first.shape)
        copy.copy_(first, non_blocking=True)
        done.record()

        def wait() -> list[torch.Tensor | None]:
            done.wait()
            taken = copy.clone()
            self._result_buffers.append((buffer, done))
            return [taken, *tensors[1:]]

        return wait

    @cached_property
    def _result_buffers(self) -> list[tuple[torch.Tensor, CudaFence]]:
        return []

    def _copy_anew(self, tensors: Sequence[torch.Tensor | None]) -> Callable[[], list[torch.Tensor | None]]:
        # The caching host allocator makes `to` non-blocking into pinned memory; the event marks its end.
        copies = [None if t is None else t.to("cpu", non_blocking=True) for t in tensors]
        done = self.make_fence()
        done.record()

        def wait() -> list[torch.Tensor | None]:
            done.wait()
            return copies

        return wait
