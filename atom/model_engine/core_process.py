"""The process of an engine core, as its parent sees it: started before anybody knows what it shall load.

It imports what every core needs, which takes seconds, while its parent reads the settings; `launch` sends them.
Its standard input stays open: the input's end tells it that its parent is gone.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from types import TracebackType

# The child imports atom from where the parent found it, not from its working directory.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from atom.model_engine.engine_process import main; main()"
)


class CoreProcess:
    """A context manager that ends the process by force, if it still runs."""

    def __init__(self) -> None:
        # Linux ties its death to that of the thread that started it, which other threads may outlive.
        self.may_die_with_parent = threading.current_thread() is threading.main_thread()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, json.dumps([path or os.getcwd() for path in sys.path])],
            stdin=subprocess.PIPE,
            process_group=0 if os.name == "posix" else None,  # Ctrl-C is for the front end to handle
        )

    def launch(self, data: bytes) -> None:
        """Send what `wire.encode_launch` made; a process that died meanwhile is noticed by its exit code."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N if signal N ended it."""
        return self._process.poll()

    def wait(self) -> int:
        """Block until it has ended; its exit code."""
        return self._process.wait()

    def kill(self) -> None:
        self._process.kill()  # harmless if it has ended

    def close(self) -> None:
        """End it by force and wait until it is gone; may be called twice."""
        self.kill()
        self.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def __enter__(self) -> "CoreProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
