"""A progress bar on stderr: shown when that is a terminal, or when asked for."""

import sys
import threading
import time

_WIDTH = 30
_SECONDS_BETWEEN_UPDATES = 0.1


class ProgressBar:
    """Counts bytes. Thread-safe; use as a context manager so that the line ends."""

    def __init__(self, title: str, total_bytes: int, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.title, self.total, self.done = title, max(total_bytes, 1), 0
        self.started = time.perf_counter()
        self._next_update = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._draw()
            sys.stderr.write("\n")

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self.done += num_bytes
            now = time.perf_counter()
            if self.enabled and now >= self._next_update:
                self._next_update = now + _SECONDS_BETWEEN_UPDATES
                self._draw()

    def _draw(self) -> None:
        share = min(self.done / self.total, 1.0)
        filled = round(share * _WIDTH)
        seconds = time.perf_counter() - self.started
        bar = "█" * filled + "░" * (_WIDTH - filled)
        sizes = f"{self.done / 1e9:.2f}/{self.total / 1e9:.2f} GB"
        sys.stderr.write(f"\r{self.title} {bar} {share:4.0%} {sizes} {seconds:.1f} s")
        sys.stderr.flush()
