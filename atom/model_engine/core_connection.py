"""The front end's side of an engine core in another process: have it load, talk with it, notice its end.

The two talk over a ZMQ socket in a directory that only this user may enter. With a `port` chosen, or where
the system has no such sockets, it is TCP on the loopback interface, encrypted and open only to whoever knows
a key that the core gets through its standard input.
"""

import shutil
import tempfile
import time
from typing import Any

from atom.config import Config
from atom.model_engine import wire
from atom.model_engine.config_transport import config_to_plain
from atom.model_engine.core_process import CoreProcess
from atom.utils.errors import AtomError, ConfigError
from atom.utils.logging import get_logger
from atom.utils.network import LOOPBACK

logger = get_logger(__name__)

HEARTBEAT_SECONDS = 1.0
_IDENTITY = b"core"
_POLL_MS = 100  # how soon a death is noticed while waiting for a message


class EngineDeadError(RuntimeError):
    """The engine core is gone, and with it what it was computing."""


class CoreStartError(AtomError):
    """The engine core could not start because of a setting; the message is its own."""


class CoreConnection:
    """A core that is starting or runs. One thread at a time; `wait_ended` may be called from another.

    settings: of config_to_plain, where they are not to be read from `config` (which `ready` changes).
    process: one that waits for its settings, instead of a new one; from here on it is ended here.
    """

    def __init__(
        self, config: Config, settings: dict[str, Any] | None = None, process: CoreProcess | None = None
    ) -> None:
        import zmq

        self.config = config
        self.heartbeats = 0
        self._directory: str | None = None
        self._process = process if process is not None else CoreProcess()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            endpoint, server_key = self._bind()
            launch = wire.Launch(
                version=wire.PROTOCOL_VERSION,
                endpoint=endpoint,
                identity=_IDENTITY,
                settings=settings if settings is not None else config_to_plain(config),
                heartbeat_seconds=HEARTBEAT_SECONDS,
                die_with_parent=self._process.may_die_with_parent,
                server_key=server_key,
            )
            self._process.launch(wire.encode_launch(launch))
        except BaseException:
            self.close(grace=0)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def fd(self) -> int:
        """Readable when messages may have come (edge-triggered: read them all, also after sending)."""
        import zmq

        return int(self._socket.getsockopt(zmq.FD))

    def wait_ready(self) -> wire.Ready:
        """Block until the model is loaded; brings the config's limits to what was resolved there.

        Raises CoreStartError for a user's mistake, EngineDeadError for any other end.
        """
        while True:
            for message in self.wait():
                if isinstance(message, wire.Hello) and message.version != wire.PROTOCOL_VERSION:
                    raise EngineDeadError(
                        f"the engine core speaks version {message.version}, not {wire.PROTOCOL_VERSION}: "
                        "two versions of ATOM are installed"
                    )
                if isinstance(message, wire.StartFailed):
                    if message.by_user:
                        raise CoreStartError(message.message)
                    raise EngineDeadError(f"the engine core could not start: {message.message}")
                if isinstance(message, wire.Ready):
                    for name, value in message.limits.items():
                        setattr(self.config, name, value)
                    self.config.reasons.update(message.reasons)
                    return message

    def wait(self) -> list[wire.FromCore]:
        """Block for at least one message other than a heartbeat. EngineDeadError if none can come any more."""
        while True:
            # Before looking for messages: what it sent before it died is there by then.
            ended = self.exit_code
            messages = self.receive()
            if messages:
                return messages
            if ended is not None:
                raise EngineDeadError(self.describe_end())
            self._socket.poll(_POLL_MS)

    def receive(self) -> list[wire.FromCore]:
        """What has arrived, without heartbeats, which are counted."""
        import zmq

        messages: list[wire.FromCore] = []
        while True:
            try:
                _, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = wire.decode_from_core(data)
            if isinstance(message, wire.Heartbeat):
                self.heartbeats += 1
            else:
                messages.append(message)

    def send(self, message: Any) -> None:
        """Never blocks; a message to a core that is gone is dropped."""
        self._socket.send_multipart((_IDENTITY, wire.encode(message)))

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N if signal N ended it."""
        return self._process.exit_code

    def wait_ended(self) -> int:
        """Block until the process has ended; its exit code."""
        return self._process.wait()

    def describe_end(self) -> str:
        code = self.exit_code
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"the engine core died ({how})"

    def kill(self) -> None:
        self._process.kill()

    def close(self, grace: float = 5.0) -> None:
        """End the process, by force if it doesn't go within `grace` seconds; may be called twice."""
        process = self._process
        if grace > 0 and process.exit_code is None and not self._socket.closed:
            self.send(wire.Shutdown())
            deadline = time.monotonic() + grace
            while process.exit_code is None and time.monotonic() < deadline:
                time.sleep(0.005)
        process.close()
        if not self._socket.closed:
            self._socket.close(linger=0)
            self._context.destroy(linger=0)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _bind(self) -> tuple[str, bytes | None]:
        """(endpoint, public CURVE key for TCP)"""
        import zmq

        socket = self._socket
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        if zmq.has("ipc") and not self.config.is_user_set("port"):
            self._directory = tempfile.mkdtemp(prefix="atom-")  # mode 0700
            endpoint = f"ipc://{self._directory}/core"
            if len(endpoint) < 100:  # longer paths don't fit a socket address
                socket.bind(endpoint)
                return endpoint, None
        public, secret = zmq.curve_keypair()
        socket.curve_secretkey, socket.curve_server = secret, True
        endpoint = f"tcp://{LOOPBACK}:{self.config.port}"
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"port={self.config.port} on {LOOPBACK} can't be used: {error.strerror}") from None
        return endpoint, public
