"""The messages between a front end and an engine core in another process, as msgpack.

A core introduces itself with `Hello`, whose version must be ours. Then it says `Ready` or `StartFailed`, takes
the messages of `ToCore`, and sends those of `FromCore`. Decoding checks types: nothing here can run code.
"""

from typing import Any

import msgspec

from atom.model_engine.protocol import EngineRequest, StepOutputs

PROTOCOL_VERSION = 4  # raise it with every change of a message


class _Message(msgspec.Struct, array_like=True, tag=True):
    pass


# --- front end -> core ---


class AddRequest(_Message):
    request: EngineRequest


class Abort(_Message):
    """Unknown or finished ids are ignored."""

    request_ids: list[str]


class Call(_Message):
    """A method of the core without arguments; answered by a `Reply` of the same id."""

    call_id: int
    method: str


class Shutdown(_Message):
    """End at once; what runs is dropped."""


# --- core -> front end ---


class Hello(_Message):
    version: int
    pid: int


class Ready(_Message):
    """The model is loaded.

    limits: Config fields as resolved there. plan: the memory plan. startup: seconds by phase.
    """

    limits: dict[str, int]
    reasons: dict[str, str]
    plan: dict[str, Any]
    startup: dict[str, float]


class StartFailed(_Message):
    """by_user: a wrong setting, which one line explains; otherwise the core's log has the traceback."""

    message: str
    by_user: bool


class Outputs(_Message):
    """Everything one step produced, and the state after it."""

    outputs: StepOutputs
    stats: dict[str, float]


class Reply(_Message):
    call_id: int
    value: bool | str | None = None
    error: str | None = None


class Heartbeat(_Message):
    """The process lives, whatever its step takes."""


ToCore = AddRequest | Abort | Call | Shutdown
FromCore = Hello | Ready | StartFailed | Outputs | Reply | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_to_core = msgspec.msgpack.Decoder(ToCore)
_from_core = msgspec.msgpack.Decoder(FromCore)


def encode(message: _Message) -> bytes:
    return _encoder.encode(message)


def decode_to_core(data: bytes) -> ToCore:
    """Raises msgspec.DecodeError or a RequestError for what isn't a message."""
    return _to_core.decode(data)


def decode_from_core(data: bytes) -> FromCore:
    """Raises msgspec.DecodeError for what isn't a message."""
    return _from_core.decode(data)


# --- the start of a core ---


class Launch(msgspec.Struct, kw_only=True):
    """What a core reads from its standard input before anything else. server_key: of CURVE, for TCP."""

    version: int
    endpoint: str
    identity: bytes
    settings: dict[str, Any]  # see config_transport
    heartbeat_seconds: float
    die_with_parent: bool
    server_key: bytes | None = None


def encode_launch(launch: Launch) -> bytes:
    data = _encoder.encode(launch)
    return len(data).to_bytes(4, "big") + data


def read_launch(stream: Any) -> Launch:
    size = int.from_bytes(stream.read(4), "big")
    return msgspec.msgpack.decode(stream.read(size), type=Launch)
