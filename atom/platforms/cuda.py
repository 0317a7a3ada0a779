"""NVIDIA GPUs."""

import torch

from atom.platforms.base import Platform


class CudaPlatform(Platform):
    name = "cuda"
    device_type = "cuda"
    kernel_backends = ("triton", "torch")
    attention_backends = ("triton", "torch")

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info()
        return free, total

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def describe(self) -> str:
        free, total = self.memory()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
