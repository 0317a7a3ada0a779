"""How paths take JSON and answer with it, whatever the protocol."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json

from atom.entrypoints.openai.errors import ApiError
from atom.entrypoints.openai.streaming import ClientLeftError, cancelled_on_disconnect

# OpenAPI: every path may answer so.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is wrong: {error: {message, type, param, code}}"},
    "5XX": {"description": "The server or its engine failed"},
}


class JsonRequest(Request):
    """Parses bodies strictly: no NaN, no unpaired surrogates, bounded nesting."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def handler(request: Request) -> Response:
            if takes_body:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json" and not kind.endswith("+json"):
                    raise ApiError(
                        415, "the header Content-Type must be application/json", code="unsupported_media_type"
                    )
            return await handle(JsonRequest(request.scope, request.receive))

        return handler


class JsonAnswer(JSONResponse):
    """As msgspec encodes: several times faster, and exact for any text."""

    def render(self, content: Any) -> bytes:
        import msgspec

        return msgspec.json.encode(content)


async def answer(http: Request, work: Coroutine[Any, Any, dict[str, Any]], close: Callable[[], None]) -> Response:
    """The work's result as JSON; it is cancelled when the client leaves. close: called in any case."""
    try:
        return JsonAnswer(await cancelled_on_disconnect(http.receive, work))
    except ClientLeftError:
        return Response(status_code=499)  # nobody reads it
    finally:
        close()
