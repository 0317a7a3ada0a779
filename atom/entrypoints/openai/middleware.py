"""What every HTTP request passes before FastAPI sees it: id, key, size, and whether the server still accepts any."""

import asyncio
import contextlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from atom.entrypoints.openai.errors import ApiError
from atom.entrypoints.openai.settings import ServerSettings
from atom.utils.logging import get_logger

logger = get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Whoever watches a server needs no key; everything else does, what is added later included.
_OPEN_PATHS = frozenset({"/", "/health", "/ping", "/version", "/metrics", "/openapi.json", "/favicon.ico"})
_OPEN_PREFIXES = ("/ui/", "/static/")
_ALWAYS_ANSWERED = frozenset({"/health", "/ping", "/version", "/metrics"})  # while shutting down, too
_DISCARD_SECONDS = 1.0
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class Gate:
    """Wraps an ASGI application. Puts "request_id" and "abort_connection" into the scope's state."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]
        self.draining = False
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["abort_connection"] = _aborter(send)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self.num_open += 1
        try:
            try:
                self._check(scope, headers)
                body = await self._read_body(scope, headers, receive)
            except ApiError as error:
                await error.response(scope)(scope, receive, send_with_id)
                return
            await self._app(scope, _replay(body, receive), send_with_id)
        finally:
            self.num_open -= 1
            if self._settings.log_requests or status >= 500:
                seconds = time.perf_counter() - started
                logger.info(
                    "request id=%s method=%s path=%s status=%d seconds=%.3f",
                    request_id, scope["method"], scope["path"], status, seconds,
                )  # fmt: skip

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if self.draining and path not in _ALWAYS_ANSWERED:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if not self._keys or path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES) or scope["method"] == "OPTIONS":
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All of them, whichever fits: the time taken tells nothing.
        if sum(hmac.compare_digest(given, key) for key in self._keys) == 0:
            raise ApiError(
                401,
                "a valid API key is needed: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        limit = self._settings.max_request_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            await _discard(receive)
            raise _too_large(limit)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._settings.read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before it had sent its request")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        if message.get("more_body"):
                            await _discard(receive)
                        raise _too_large(limit)
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            seconds = self._settings.read_timeout
            raise ApiError(408, f"the request's body did not arrive within {seconds:g} s") from None


async def _discard(receive: Receive) -> None:
    """Read on for a moment: closing while a client still sends would reset the connection before it sees the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await receive()).get("more_body"):
                pass


def _too_large(limit: int) -> ApiError:
    # The body may not have been read to its end, so the connection can't be used again.
    return ApiError(
        413, f"the request is larger than {limit} bytes", code="request_too_large", headers={"Connection": "close"}
    )


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own if it is short and plain, so that it can't forge log lines."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _aborter(send: Send) -> Callable[[], None]:
    """Ends the connection without waiting for the peer, if the server lets us (uvicorn does)."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    abort = getattr(transport, "abort", None)
    return abort if abort is not None else lambda: None


def _replay(body: bytes, receive: Receive) -> Receive:
    delivered = False

    async def replay() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
