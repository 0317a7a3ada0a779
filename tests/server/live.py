"""A real server in a process of its own, with the embedded model, for tests to talk to over a socket."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120


@dataclass
class LiveServer:
    process: subprocess.Popen[bytes]
    url: str  # without a slash at its end
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextlib.contextmanager
def live_server(directory: Path, *flags: str, model: str = "smollm2") -> Iterator[LiveServer]:
    """`atom serve` on a free port, ready for requests; ended with SIGTERM."""
    log_path = directory / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "atom.entrypoints.openai_server", "--model", model, "--server-port", "0"]
    command += ["--dtype", "float32", "--max-model-len", "1024", *flags]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "2"})
    server = LiveServer(process, "", log_path)
    try:
        server.url = _wait_until_serving(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _wait_until_serving(server: LiveServer) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found = re.search(r"serving \S+ on (https?://\S+)", server.log)
        if found:
            return found[1]
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}:\n{server.log}")
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready in {START_SECONDS} s:\n{server.log}")
