"""Has the system read a checkpoint's next bytes while the last ones are converted and copied."""

import contextlib
import threading
from collections.abc import Iterable

from atom.model_loader.checkpoint import FileSpan

_PIECE = 8 << 20  # bytes asked for at a time
WINDOW = 1 << 30  # bytes ahead, which lie in the page cache and in no process


class ReadAhead:
    """A thread that stays at most `window` bytes ahead of `advance`. A context manager: it ends with the block."""

    def __init__(self, spans: Iterable[FileSpan], window: int = WINDOW) -> None:
        self._spans = list(spans)
        self._window = window
        self._used = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def advance(self, size: int) -> None:
        """So many bytes of the spans have been used."""
        with self._changed:
            self._used += size
            self._changed.notify()

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        asked = 0
        # A file system that takes no hints is read without them.
        with contextlib.suppress(OSError):
            for span in self._spans:
                for start in range(0, span.size, _PIECE):
                    size = min(_PIECE, span.size - start)
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopped or asked + size <= self._used + self._window)  # noqa: B023
                        if self._stopped:
                            return
                    span.file.will_need(span.offset + start, size)
                    asked += size
