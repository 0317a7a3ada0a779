"""NVIDIA GPUs."""

from collections.abc import Callable, Sequence

import torch

from atom.platforms.base import Platform


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

    def copy_to_host(self, tensors: Sequence[torch.Tensor | None]) -> Callable[[], list[torch.Tensor | None]]:
        # The caching host allocator makes `to` non-blocking into pinned memory; the event marks its end.
        copies = [None if t is None else t.to("cpu", non_blocking=True) for t in tensors]
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[torch.Tensor | None]:
            done.synchronize()
            return copies

        return wait
