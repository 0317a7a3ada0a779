"""Errors as clients expect them: OpenAI's {"error": {"message", "type", "param", "code"}}, and Anthropic's."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from atom.model_engine.async_llm_engine import EngineDeadError, StreamDroppedError
from atom.utils.errors import RequestError
from atom.utils.logging import get_logger

logger = get_logger(__name__)

_LONGEST_MESSAGE = 1000  # a message may quote what the client sent
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(HTTPException):
    """An answer other than success. `type` follows from the status unless it is given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message = message
        self.param = param
        self.code = code
        self.type = type or _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        message = self.message.encode("utf-8", "replace").decode()  # unpaired surrogates can't be sent
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + "..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str | None = None) -> dict[str, Any]:
        """{"type": "error", "error": {"type", "message"}}, and the request's id where it is known."""
        kind = _ANTHROPIC_TYPES.get(self.status_code)
        if kind is None:
            kind = "invalid_request_error" if self.status_code < 500 else "api_error"
        body = {"type": "error", "error": {"type": kind, "message": self.body()["error"]["message"]}}
        return body if request_id is None else body | {"request_id": request_id}

    def response(self, scope: Mapping[str, Any]) -> JSONResponse:
        """The answer to a request, in the shape of its path's protocol."""
        if not scope["path"].startswith("/v1/messages"):
            return JSONResponse(self.body(), self.status_code, headers=self.headers)
        request_id = scope.get("state", {}).get("request_id", "")
        headers = {**(self.headers or {}), "request-id": request_id}
        return JSONResponse(self.anthropic_body(request_id), self.status_code, headers=headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about any exception; details of unexpected ones stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=_code_of(error))
    if isinstance(error, EngineDeadError):
        return ApiError(500, f"{error}; this request is lost", code="engine_dead")
    if isinstance(error, StreamDroppedError):
        return ApiError(503, str(error), code="request_dropped")
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.scope)

    for kind in (RequestValidationError, HTTPException, RequestError, EngineDeadError, StreamDroppedError, Exception):
        app.add_exception_handler(kind, handle)


def _code_of(error: RequestError) -> str | None:
    return "context_length_exceeded" if error.param == "prompt" and "max_model_len" in str(error) else None


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong; of a union, the alternatives' complaints."""
    problems = error.errors()
    if not problems:
        return ApiError(400, "the request is not valid")
    first = problems[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    name = path[0] if path else None
    messages = list(dict.fromkeys(str(p["msg"]) for p in problems if p["loc"][:2] == first["loc"][:2]))
    where = ".".join(path) if len(messages) == 1 else name
    text = "; or ".join(messages[:4])
    return ApiError(400, f"{where}: {text}" if where else text, param=name, code="invalid_type")
