"""Where the time of a start goes: named phases that sum to the whole, at no cost once it is over.

Each thread has at most one start under way. Code marks its part with `with phase("load"):` and needn't know who
measures; where nothing is being measured, that does nothing. A phase within a phase takes its time from the outer.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from atom.utils.logging import get_logger

logger = get_logger(__name__)

FIRST_TOKEN, OTHER, TOTAL = "first token", "other", "total"

_SHOWN = 0.0005  # seconds; less is not worth a line of the log

_threads = threading.local()  # .timer: the start under way in this thread
_NOTHING = nullcontext()


class StartupTimer:
    """Seconds by phase. Used by one thread, except `note`."""

    def __init__(self, since_process: bool = False) -> None:
        """since_process: count from the creation of this process, as a program should; "python" is what passed."""
        self._phases: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self._inner = [0.0]  # seconds that phases within the open ones took, by depth
        self._ended: float | None = None
        before = process_age() if since_process else 0.0
        self._began = time.perf_counter() - before
        if before:
            self._phases["python"] = before
            self._inner[0] = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time within, without that of phases inside it, counts for `name`; a name may come again."""
        self._phases.setdefault(name, 0.0)  # in the order of their beginning
        self._inner.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._phases[name] += seconds - self._inner.pop()
            self._inner[-1] += seconds

    def note(self, name: str, text: str) -> None:
        """Words to show beside a phase."""
        self._notes[name] = text

    def split_up(self, name: str, parts: Mapping[str, float], prefix: str) -> None:
        """Replace phase `name`, in which this thread waited for another process, by what that one did then.

        parts: its own split. Only its end was waited for, if this thread did something else before.
        """
        room = self._phases.pop(name, 0.0)
        shares = {}
        for part in reversed([part for part in parts if part not in (TOTAL, FIRST_TOKEN)]):
            shares[prefix + part] = min(parts[part], room)
            room -= shares[prefix + part]
        self._phases[name] = room
        self._phases.update(reversed(shares.items()))

    def end(self) -> None:
        """It can serve now. Only `add_first_token` changes the split from here on."""
        if self._ended is None:
            self._ended = time.perf_counter()
        if getattr(_threads, "timer", None) is self:
            _threads.timer = None

    def add_first_token(self, seconds: float) -> None:
        """The time of the steps up to the first token; waiting for a first request doesn't count."""
        self._phases[FIRST_TOKEN] = seconds
        if self._ended is not None:
            self._ended += seconds

    def seconds(self) -> dict[str, float]:
        """By phase in the order of time, then "other" and "total": what they sum to."""
        total = (self._ended or time.perf_counter()) - self._began
        rest = {OTHER: max(0.0, total - sum(self._phases.values()))}
        return {**self._phases, **rest, TOTAL: sum(self._phases.values()) + rest[OTHER]}

    def log(self) -> None:
        """One line a phase that took any time, at level debug."""
        for name, seconds in self.seconds().items():
            note = self._notes.get(name)
            if note or seconds >= _SHOWN or name == TOTAL:
                logger.debug("%-30s %7.3f s%s", name, seconds, f"  ({note})" if note else "")


def begin(since_process: bool = False) -> StartupTimer:
    """Measure a start in this thread, from now on or from the creation of the process; ends with `finish`."""
    _threads.timer = StartupTimer(since_process)
    return _threads.timer


def finish() -> None:
    """End the start under way in this thread, if there is one, and log where its time went."""
    timer = current()
    if timer is not None:
        timer.end()
        timer.log()


@contextmanager
def measured(since_process: bool = False) -> Iterator[StartupTimer]:
    """As part of the start under way in this thread, or as a start of its own that ends here."""
    timer = current()
    if timer is not None:
        yield timer
        return
    timer = begin(since_process)
    try:
        yield timer
    except BaseException:
        timer.end()
        raise
    finish()


def current() -> StartupTimer | None:
    """The start under way in this thread."""
    return getattr(_threads, "timer", None)


def phase(name: str) -> AbstractContextManager[None]:
    timer = current()
    return timer.phase(name) if timer is not None else _NOTHING


def note(name: str, text: str) -> None:
    timer = current()
    if timer is not None:
        timer.note(name, text)


def process_age() -> float:
    """Seconds since this process was created, to about 10 ms; 0 where the system doesn't say."""
    try:
        if sys.platform == "linux":
            with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
                ticks = int(file.read().rpartition(")")[2].split()[19])
            created = ticks / os.sysconf("SC_CLK_TCK")
            return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - created)
        import psutil

        return max(0.0, time.time() - psutil.Process().create_time())
    except (OSError, ValueError, IndexError, AttributeError, ImportError):
        return 0.0
