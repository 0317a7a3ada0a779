"""An HTTP/1.1 client that costs a few microseconds a token: the server it measures shares the machine with it.

Protocols instead of streams, one C parser a connection, no task switch a token; requests are encoded before they
are needed. Connections are kept and taken again, last used first.
"""

import asyncio
import os
import ssl
from collections.abc import Mapping
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from atom.entrypoints.bench_serve.events import AnswerReader, error_text
from atom.entrypoints.bench_serve.records import Record
from atom.entrypoints.bench_serve.sse import EventParser
from atom.utils.errors import ConfigError


class ConnectionFailedError(Exception):
    """No connection, or it was lost; `stale` if that can be due to its idling and not to the request."""

    def __init__(self, message: str, stale: bool = False) -> None:
        super().__init__(message)
        self.stale = stale


class _Connection(asyncio.Protocol):
    """One request at a time. An event's time is that of the chunk it came in."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.used = False
        self._response: asyncio.Future[None] | None = None
        self._reset(None)

    def _reset(self, reader: AnswerReader | None) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._reader = reader
        self._events = EventParser()
        self._heard = False
        self._streams = False
        self._keep_alive = False
        self.status = 0
        self.body = b""

    @property
    def reusable(self) -> bool:
        return self.transport is not None and not self.transport.is_closing() and self._response is None

    async def exchange(self, request: bytes, reader: AnswerReader | None) -> None:
        """Sends a request and returns when the response is complete: `status`, and `body` if it was not a stream."""
        self._reset(reader)
        if self.transport is None or self.transport.is_closing():
            raise ConnectionFailedError("connection lost", stale=self.used)
        self._response = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            await self._response
        except BaseException:
            self.close()  # whatever else comes belongs to this request
            raise
        finally:
            self._response = None
        self.used = True
        if not self._keep_alive:
            self.close()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        self._heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(ConnectionFailedError(f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self._reader is not None and self._reader.done:
            self._finish(None)  # an answer may end with its connection
        else:
            self._finish(ConnectionFailedError("connection lost", stale=self.used and not self._heard))

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._streams = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._streams = self._streams and self.status == 200 and self._reader is not None

    def on_body(self, body: bytes) -> None:
        if self._streams:
            now, read = self._now, cast(AnswerReader, self._reader).read
            for data in self._events.feed(body):
                read(data, now)
        else:
            self.body += body

    def on_message_complete(self) -> None:
        if self.status != 100:
            self._keep_alive = self._parser.should_keep_alive()  # only now does the parser know
            self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        response = self._response
        if response is None or response.done():
            return
        if error is None:
            response.set_result(None)
        else:
            response.set_exception(error)


class Client:
    """Requests to one server. headers: sent with each; timeouts in seconds."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 3600.0,
        connect_timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        parts = _split(base_url)
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._host, self._port = cast(str, parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = urlsplit(self.base_url).path
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        sent = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "atom-bench", "Accept": "*/*"} | dict(
            headers or {}
        )
        for name, value in sent.items():
            if not name.isascii() or not name or any(c in name + value for c in "\r\n\0") or set(name) & set(" :"):
                raise ConfigError(f"header={name!r} is not a header that HTTP can carry; write NAME=VALUE")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        self._idle: list[_Connection] = []

    def encode(self, method: str, path: str, body: Any = None) -> bytes:
        """A request's bytes, for `send` or `stream`."""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
        data = b"" if body is None else msgspec.json.encode(body)
        if body is not None or method != "GET":
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        return f"{head}\r\n".encode("utf-8", "surrogateescape") + data

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Status and body. Raises ConnectionFailedError, TimeoutError."""
        async with asyncio.timeout(self._timeout):
            connection = await self._exchange(request, None)
        return connection.status, connection.body

    async def stream(self, request: bytes, record: Record) -> None:
        """Runs one request for a streamed answer; all that comes of it, errors too, goes to the record."""
        reader = AnswerReader(record)
        record.started = perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._exchange(request, reader)
        except TimeoutError:
            record.error = f"timeout after {self._timeout:g} s"
        except ConnectionFailedError as error:
            record.error = record.error or str(error)
        else:
            if connection.status != 200:
                record.error = f"HTTP {connection.status}: {error_text(connection.body)}"
            elif connection.body:
                record.error = "the answer is not an event stream"
            else:
                reader.end()
        record.ended = record.event_times[-1] if record.event_times and record.error is None else perf_counter()

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, request: bytes, reader: AnswerReader | None) -> _Connection:
        while True:
            connection = await self._connection()
            try:
                await connection.exchange(request, reader)
            except ConnectionFailedError as error:
                if error.stale:  # a server may close a connection that idles just as it is used again
                    continue
                raise
            if connection.reusable:
                self._idle.append(connection)
            return connection

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except TimeoutError:
            raise ConnectionFailedError(f"no connection within {self._connect_timeout:g} s") from None
        except ssl.SSLError as error:
            raise ConnectionFailedError(f"TLS: {getattr(error, 'verify_message', '') or error.reason}") from None
        except OSError as error:
            raise ConnectionFailedError(_os_error_text(error)) from None
        return connection


def _split(base_url: str) -> Any:
    message = f"base_url={base_url!r} must be a URL such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(base_url)
        parts.port  # noqa: B018 - raises on a port that is no port
    except ValueError:
        raise ConfigError(message) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(message)
    return parts


def _os_error_text(error: OSError) -> str:
    """Without addresses and numbers that change from one connection to the next."""
    if isinstance(error, ConnectionRefusedError) or (error.errno is None and "refused" in str(error).lower()):
        return "connection refused"
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
