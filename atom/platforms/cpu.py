"""CPU: the default on a fresh machine and the oracle."""

import os
from platform import machine

import psutil
import torch

from atom.platforms.base import Platform


class CpuPlatform(Platform):
    name = "cpu"
    device_type = "cpu"
    kernel_backends = ("cpu", "torch")
    attention_backends = ("cpu", "torch")

    def memory(self) -> tuple[int, int]:
        vm = psutil.virtual_memory()
        return min(vm.available, _cgroup_free(vm.available)), vm.total

    def synchronize(self) -> None:
        pass

    def chip(self) -> str:
        return f"cpu {machine()} {torch.backends.cpu.get_cpu_capability()}"

    def describe(self) -> str:
        free, total = self.memory()
        return f"CPU, {torch.get_num_threads()} threads, {free / 2**30:.1f} of {total / 2**30:.1f} GiB RAM free"


def _cgroup_free(default: int) -> int:
    """Bytes a container may still take; psutil sees only the host."""
    base = "/sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            with open(os.path.join(base, limit)) as f, open(os.path.join(base, used)) as g:
                top = f.read().strip()
                if top != "max":
                    return max(0, int(top) - int(g.read()))
        except (OSError, ValueError):
            continue
    return default
