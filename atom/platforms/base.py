"""The interface every platform fulfils."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch


class Fence:
    """A place in the device's queue of work. On a device that works at once it is always behind."""

    def record(self) -> None:
        """Move it behind all work queued so far."""

    def is_passed(self) -> bool:
        """Whether the device has done all work before it; never waits."""
        return True


class Platform(ABC):
    """Facts about a kind of device and the few calls that differ between kinds."""

    name: str
    device_type: str  # torch's name of the device
    kernel_backends: tuple[str, ...]  # folders of atom/kernels, best first; "torch" is always last
    attention_backends: tuple[str, ...]  # names in atom/layers/attention/registry.py, best first
    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    has_graphs: bool = False  # whether device work can be captured and replayed

    def device(self, index: int = 0) -> torch.device:
        return torch.device(self.device_type, index) if self.device_type != "cpu" else torch.device("cpu")

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device's queued work."""

    @abstractmethod
    def chip(self) -> str:
        """What compiled code depends on: the chip's name and instruction set."""

    @abstractmethod
    def describe(self) -> str:
        """One line for logs: which chip, how many cores or how much memory."""

    def reset_peak_memory(self) -> None:  # noqa: B027 - nothing to measure by default
        """Start measuring `peak_memory` here."""

    def peak_memory(self) -> int:
        """Bytes allocated at the highest point since `reset_peak_memory`, beyond those then; 0 = not measured."""
        return 0

    def make_fence(self) -> Fence:
        return Fence()

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """uint8 on the host, that copies to the device without waiting; not initialized."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy_to_host(self, tensors: Sequence[torch.Tensor | None]) -> Callable[[], list[torch.Tensor | None]]:
        """Start copying; the call returned waits for the copies and hands them out."""
        copies = list(tensors)
        return lambda: copies
