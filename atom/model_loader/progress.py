"""A progress bar on stderr: shown when that is a terminal, or when asked for."""

import sys
import threading
import time

_WIDTH = 30
_SECONDS_BETWEEN_UPDATES = 0.1


class ProgressBar:
    """Counts bytes, or items (in_bytes=False). Thread-safe; a context manager, so that the line ends."""

    def __init__(self, title: str, total: int, enabled: bool | None = None, in_bytes: bool = True) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.title, self.total, self.done = title, max(total, 1), 0
        self.in_bytes = in_bytes
        self.started = time.perf_counter()
        self._next_update = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._draw()
            sys.stderr.write("\n")

    def advance(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.perf_counter()
            if self.enabled and now >= self._next_update:
                self._next_update = now + _SECONDS_BETWEEN_UPDATES
                self._draw()

    def _draw(self) -> None:
        share = min(self.done / self.total, 1.0)
        filled = round(share * _WIDTH)
        seconds = time.perf_counter() - self.started
        bar = "█" * filled + "░" * (_WIDTH - filled)
        sizes = f"{self.done / 1e9:.2f}/{self.total / 1e9:.2f} GB" if self.in_bytes else f"{self.done}/{self.total}"
        sys.stderr.write(f"\r{self.title} {bar} {share:4.0%} {sizes} {seconds:.1f} s")
        sys.stderr.flush()
