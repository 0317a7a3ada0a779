"""Server-sent events, and noticing clients that leave or don't read."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from atom.entrypoints.openai.errors import as_api_error
from atom.utils.logging import get_logger

logger = get_logger(__name__)

_T = TypeVar("_T")
DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    """One event of OpenAI's streams."""
    return b"data: " + _encode(data) + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """One event of streams whose events have names."""
    return b"event: " + name.encode() + b"\n" + event(data)


class OpenStreams:
    """The responses being sent; a look every few seconds finds those whose client doesn't read."""

    def __init__(self) -> None:
        self._sending: dict[EventStream, float] = {}

    def started(self, stream: "EventStream") -> None:
        self._sending[stream] = time.monotonic()

    def ended(self, stream: "EventStream") -> None:
        self._sending.pop(stream, None)

    def drop_stalled(self, seconds: float) -> int:
        """End connections that have taken nothing for so long; how many."""
        now = time.monotonic()
        stalled = [stream for stream in self._sending if stream.waiting_since and now - stream.waiting_since > seconds]
        for stream in stalled:
            logger.warning("a client did not read its answer for %g s: dropped", seconds)
            stream.abort()
        return len(stalled)


class EventStream(Response):
    """Sends what `events` yields. An exception becomes a last event with the error, without [DONE].

    A client that leaves cancels the generator. close: called in the end, even if the generator never began.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        streams: OpenStreams,
        close: Callable[[], None],
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._streams = streams
        self._close = close
        self.waiting_since = 0.0  # when the sending that still waits began
        self.abort: Callable[[], None] = lambda: None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.abort = scope.get("state", {}).get("abort_connection", self.abort)
        self._streams.started(self)
        try:
            await cancelled_on_disconnect(receive, self._send_all(send))
        except ClientLeftError:
            pass
        finally:
            self._streams.ended(self)
            self._close()

    async def _send_all(self, send: Any) -> None:
        async with contextlib.aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._guarded():
                self.waiting_since = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self.waiting_since = 0.0
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _guarded(self) -> AsyncIterator[bytes]:
        try:
            async for data in self._events:
                yield data
        except Exception as error:
            yield event(as_api_error(error).body())


class ClientLeftError(Exception):
    """The client closed its connection; nobody reads what is answered."""


async def cancelled_on_disconnect(receive: Callable[[], Awaitable[Any]], work: Awaitable[_T]) -> _T:
    """The work's result; it is cancelled, and ClientLeftError raised, when the client leaves."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            raise ClientLeftError from None
        task.cancel()
        with contextlib.suppress(BaseException):
            await task
        raise
    finally:
        watcher.cancel()
