"""Brings tensors from files to a device through small pinned buffers: one piece is read while the last is copied."""

import contextlib
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from atom.model_loader.checkpoint import CheckpointTensor

CHUNK = 8 << 20  # bytes of a buffer; each thread has two
IN_FLIGHT = 512 << 20  # bytes of tensors on their way to their parameters, if one alone isn't larger


class Budget:
    """Holds callers back while more than `limit` is in use; one alone may exceed it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Any:
        with self._freed:
            self._freed.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify_all()


class Staging:
    """Loads plain tensors to `device`. Each thread has buffers and, on a GPU, a stream of its own.

    Within `stream()` a loaded tensor may be used at once; `finish` waits for everything on all of them.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK) -> None:
        self._device = device
        self._chunk = chunk
        self._on_gpu = device.type == "cuda"
        self._own = threading.local()
        self._lock = threading.Lock()
        self._streams: list[Any] = []
        self.read_seconds = 0.0  # of all threads
        self.budget = Budget(IN_FLIGHT)
        if self._on_gpu:
            torch.cuda.synchronize(device)  # what initialized the parameters ran on another stream

    def stream(self) -> AbstractContextManager[Any]:
        """This thread's stream, as the current one."""
        if not self._on_gpu:
            return contextlib.nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
            with self._lock:
                self._streams.append(self._own.stream)
        return torch.cuda.stream(self._own.stream)

    def load(self, tensor: CheckpointTensor) -> torch.Tensor:
        """The tensor on the device, as it is in the file. Raises ModelLoadError, naming the file."""
        span = tensor.span
        assert span is not None
        assert span.plain
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        target = result.view(-1).view(torch.uint8) if result.numel() else result.view(-1)
        assert target.nbytes == span.size, f"{tensor.name}: {span.size} bytes for {tensor.shape} {tensor.dtype}"
        buffers = self._buffers()
        read = 0.0
        for number, start in enumerate(range(0, span.size, self._chunk)):
            buffer, copied = buffers[number % 2]
            size = min(self._chunk, span.size - start)
            if copied is not None:
                copied.synchronize()  # what it held before is on the device
            started = time.perf_counter()
            span.file.read_into(buffer.numpy().data[:size], span.offset + start)
            read += time.perf_counter() - started
            target[start : start + size].copy_(buffer[:size], non_blocking=True)
            if copied is not None:
                copied.record()
        with self._lock:
            self.read_seconds += read
        return result

    def finish(self) -> None:
        """Wait for all copies, and give back the memory that they took on the way."""
        for stream in self._streams:
            stream.synchronize()
        self._own = threading.local()
        if self._on_gpu:
            torch.cuda.empty_cache()
            if hasattr(torch._C, "_host_emptyCache"):  # pinned memory; without it, it is kept for the next user
                torch._C._host_emptyCache()

    def _buffers(self) -> list[tuple[torch.Tensor, Any]]:
        if not hasattr(self._own, "buffers"):
            self._own.buffers = [
                (
                    torch.empty(self._chunk, dtype=torch.uint8, device="cpu", pin_memory=self._on_gpu),
                    torch.cuda.Event() if self._on_gpu else None,
                )
                for _ in range(2)
            ]
        return self._own.buffers
