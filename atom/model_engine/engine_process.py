"""An engine core in a process of its own: import, read the settings, load, then serve messages until told to end.

The parent starts it (core_process) and sends the settings to its standard input, which stays open: its end means
that the parent is gone. The loop blocks on its socket when idle, takes all waiting messages between two steps,
and sends what a step produced as one message.
"""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from atom.model_engine import wire
from atom.model_engine.protocol import StepOutputs
from atom.utils import startup
from atom.utils.errors import AtomError
from atom.utils.logging import get_logger

if TYPE_CHECKING:
    import zmq

    from atom.model_engine.engine_core import EngineCore

logger = get_logger(__name__)

EXIT_USER_ERROR = 2
_METHODS = ("reset_prefix_cache", "start_profile", "stop_profile")
_MAX_FAILED_STEPS = 3  # in a row; then the device, not a request, must be at fault
_LIMITS = ("max_model_len", "num_kvcache_blocks", "max_num_seqs", "max_num_batched_tokens")
_PR_SET_PDEATHSIG = 1


class CoreLoop:
    """Drives an EngineCore by messages of a DEALER socket."""

    def __init__(self, core: "EngineCore", socket: "zmq.Socket[bytes]") -> None:
        self._core = core
        self._socket = socket
        self._running = True
        self._failed_steps = 0
        self._reported_idle = False

    def run(self) -> None:
        """Until a Shutdown message. Raises what a step raised when it fails again and again."""
        while self._running:
            busy = self._core.has_unfinished()
            if not busy and not self._reported_idle:
                self._send(wire.Outputs(StepOutputs(), self._core.stats()))
                self._reported_idle = True
            self._take_messages(wait=not busy)
            if self._running and self._core.has_unfinished():
                self._reported_idle = False
                self._step()

    def _take_messages(self, wait: bool) -> None:
        """Everything that has arrived; with `wait`, at least one message."""
        import zmq

        flags = 0 if wait else zmq.NOBLOCK
        while True:
            try:
                data = self._socket.recv(flags)
            except zmq.Again:
                return
            try:
                self._handle(wire.decode_to_core(data))
            except Exception:
                logger.exception("a message of %d bytes could not be handled", len(data))
            flags = zmq.NOBLOCK

    def _handle(self, message: wire.ToCore) -> None:
        if isinstance(message, wire.AddRequest):
            self._core.add_request(message.request)
        elif isinstance(message, wire.Abort):
            self._core.abort(message.request_ids)
            self._reported_idle = False
        elif isinstance(message, wire.Call):
            self._call(message)
        else:
            self._running = False

    def _call(self, message: wire.Call) -> None:
        reply = wire.Reply(message.call_id)
        try:
            if message.method not in _METHODS:
                raise ValueError(f"unknown method {message.method!r}")
            reply.value = getattr(self._core, message.method)()
        except Exception as error:
            logger.exception("%s failed", message.method)
            reply.error = f"{type(error).__name__}: {error}"
        self._send(reply)

    def _step(self) -> None:
        try:
            outputs = self._core.step()
            self._failed_steps = 0
        except Exception as error:
            self._failed_steps += 1
            logger.exception("a step failed")
            if self._failed_steps == _MAX_FAILED_STEPS:
                raise
            outputs = self._core.recover(f"the engine failed: {type(error).__name__}: {error}")
        self._send(wire.Outputs(outputs, self._core.stats()))
        if not outputs and not self._core.is_stepping():
            time.sleep(0.001)  # nothing may be admitted yet: don't spin

    def _send(self, message: Any) -> None:
        self._socket.send(wire.encode(message), copy=True)


def main() -> None:
    # The parent decides when to stop: it may have to drain first.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    launches: SimpleQueue[wire.Launch] = SimpleQueue()
    threading.Thread(target=_read_parent, args=(launches,), name="parent-watch", daemon=True).start()
    gc.disable()  # collecting while modules and weights load finds nothing and takes a fifth of the time
    startup.begin(since_process=True)
    with contextlib.suppress(Exception):  # raised again, and told, where they are used
        _import_all()
    with startup.phase("wait for settings"):
        launch = launches.get()
    parent = os.getppid()
    if launch.die_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    code = _serve(launch)
    sys.stderr.flush()
    os._exit(code)  # threads of libraries must not delay the end, nor complain of it


def _import_all() -> None:
    """What a core needs whatever it loads."""
    with startup.phase("import torch"):
        import torch  # noqa: F401 - to be timed by itself
    with startup.phase("import atom"):
        from atom.model_engine import config_transport, engine_core, model_runner  # noqa: F401
        from atom.utils.hf_config import import_transformers
    import_transformers()


def _serve(launch: wire.Launch) -> int:
    import zmq

    context = zmq.Context()
    socket = _connect(context, launch, launch.identity)
    try:
        socket.send(wire.encode(wire.Hello(wire.PROTOCOL_VERSION, os.getpid())))
        if launch.version != wire.PROTOCOL_VERSION:
            return 1  # the Hello has told the parent why
        try:
            core = _load(launch)
        except AtomError as error:
            socket.send(wire.encode(wire.StartFailed(" ".join(str(error).split()), by_user=True)))
            return EXIT_USER_ERROR
        except Exception as error:
            logger.exception("the engine core could not start")
            socket.send(wire.encode(wire.StartFailed(f"{type(error).__name__}: {error}", by_user=False)))
            return 1
        threading.Thread(target=_beat, args=(context, launch), name="heartbeat", daemon=True).start()
        socket.send(wire.encode(_ready(core)))
        try:
            CoreLoop(core, socket).run()
        except Exception:
            logger.critical("the engine core gives up after %d failed steps in a row", _MAX_FAILED_STEPS)
            return 1
        with contextlib.suppress(Exception):
            core.close()
        return 0
    finally:
        socket.close(linger=2000)
        context.destroy(linger=2000)


def _load(launch: wire.Launch) -> "EngineCore":
    from atom.model_engine.config_transport import config_from_plain
    from atom.model_engine.engine_core import EngineCore

    try:
        with startup.phase("config"):
            config = config_from_plain(launch.settings)
        core = EngineCore(config)
        startup.finish()
        return core
    finally:
        gc.freeze()
        gc.enable()


def _ready(core: "EngineCore") -> wire.Ready:
    config = core.config
    return wire.Ready(
        limits={name: getattr(config, name) for name in _LIMITS},
        reasons={name: reason for name, reason in config.reasons.items() if name in _LIMITS},
        plan=core.describe(),
        startup=core.startup,
    )


def _connect(context: Any, launch: wire.Launch, identity: bytes) -> Any:
    import zmq

    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if launch.server_key is not None:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = launch.server_key
    socket.connect(launch.endpoint)
    return socket


def _beat(context: Any, launch: wire.Launch) -> None:
    import zmq

    beat = wire.encode(wire.Heartbeat())
    with contextlib.suppress(zmq.ZMQError):  # the context ends
        socket = _connect(context, launch, launch.identity + b".heartbeat")
        socket.setsockopt(zmq.LINGER, 0)
        while True:
            socket.send(beat)
            time.sleep(launch.heartbeat_seconds)


def _read_parent(launches: "SimpleQueue[wire.Launch]") -> None:
    """The parent writes the settings and never again: standard input ends when it does."""
    with contextlib.suppress(Exception):
        launches.put(wire.read_launch(sys.stdin.buffer))
        while os.read(0, 4096):
            pass
    os._exit(1)


if __name__ == "__main__":
    main()
