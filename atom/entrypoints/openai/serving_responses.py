"""/v1/responses: OpenAI's Responses on top of the chat service."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRouter

from atom.entrypoints.openai.conversion import Turns, errors_named, reasoning_tokens
from atom.entrypoints.openai.errors import ApiError, as_api_error
from atom.entrypoints.openai.protocol import ChatMessage
from atom.entrypoints.openai.responses_events import ResponseEvents, output_of, status_of
from atom.entrypoints.openai.responses_protocol import NAMES, ResponsesRequest, add_input
from atom.entrypoints.openai.responses_store import ResponseStore, StoredResponse
from atom.entrypoints.openai.routing import ERRORS, JsonRoute, answer
from atom.entrypoints.openai.serving_chat import ChatService, PreparedChat
from atom.entrypoints.openai.streaming import EventStream


@dataclass(slots=True)
class PreparedResponse:
    """A response whose chat is queued. Close the chat."""

    id: str
    request: ResponsesRequest
    chat: PreparedChat
    conversation: list[ChatMessage]  # without instructions, which hold for one response


class ResponsesService:
    def __init__(self, chats: ChatService) -> None:
        self._chats = chats
        self.store = ResponseStore()

    async def prepare(self, request: ResponsesRequest, http: Request) -> PreparedResponse:
        """Check everything and queue the chat. ApiError, RequestError."""
        request.check()
        history = []
        if request.previous_response_id is not None:
            history = self.stored(request.previous_response_id, "previous_response_id").messages()
        with errors_named(NAMES):
            chat_request, conversation = request.chat(history)
            chat = await self._chats.prepare(chat_request, http, id_prefix="resp")
        # Not the chat's id: who knows a response's id can read it, so nobody may guess it.
        return PreparedResponse(f"resp_{uuid.uuid4().hex}", request, chat, conversation)

    async def complete(self, prepared: PreparedResponse) -> dict[str, Any]:
        (whole,) = await self._chats.complete(prepared.chat)
        return await self._finish(prepared, output_of(whole), whole.reasoning_content, whole.finish_reason)

    async def stream(self, prepared: PreparedResponse) -> AsyncGenerator[bytes, None]:
        """Server-sent events; one that fails ends with response.failed."""
        events = ResponseEvents()
        body = self._body(prepared, "in_progress", [])
        try:
            yield events.response("created", body) + events.response("in_progress", body)
            async for news in self._chats.deltas(prepared.chat):
                data = b"".join(events.delta(delta) for delta in news)
                if data:
                    yield data
            body = await self._finish(prepared, events.output, events.reasoning, events.finish_reason)
            yield events.response(body["status"], body)
        except Exception as error:
            problem = as_api_error(error)
            body = self._body(prepared, "failed", events.output)
            code = "rate_limit_exceeded" if problem.status_code == 429 else "server_error"
            body["error"] = {"code": code, "message": problem.body()["error"]["message"]}
            yield events.response("failed", body)
        finally:
            prepared.chat.close()

    def stored(self, response_id: str, param: str) -> StoredResponse:
        found = self.store.get(response_id)
        if found is None:
            raise ApiError(404, f"response {response_id!r:.100} is not stored", param=param, code="response_not_found")
        return found

    async def _finish(
        self, prepared: PreparedResponse, output: list[dict[str, Any]], reasoning: str, finish_reason: str | None
    ) -> dict[str, Any]:
        """The response's body when all is said; kept if the client wants it."""
        chat, status = prepared.chat, status_of(finish_reason)
        body = self._body(prepared, status, output)
        if status == "completed":
            body["completed_at"] = int(time.time())
        else:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        num_reasoning = await reasoning_tokens(self._chats.context, reasoning, chat.num_completion_tokens)
        body["usage"] = {
            "input_tokens": chat.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": chat.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": chat.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": num_reasoning},
            "total_tokens": chat.num_prompt_tokens + chat.num_completion_tokens,
        }
        if body["store"]:
            turns = Turns(prepared.conversation)
            add_input(turns, output)
            self.store.put(body, turns.messages)
        return body

    def _body(self, prepared: PreparedResponse, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request, chat = prepared.request, prepared.chat
        form = request.text.format if request.text is not None else None
        reasoning = request.reasoning
        return {
            "id": prepared.id,
            "object": "response",
            "created_at": chat.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": chat.model,
            "output": list(output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {
                "effort": reasoning.effort if reasoning is not None else None,
                "summary": reasoning.summary if reasoning is not None else None,
            },
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }


def mount(app: FastAPI) -> None:
    service = ResponsesService(app.state.chat)
    streams = app.state.context.streams
    router = APIRouter(route_class=JsonRoute, responses=ERRORS)

    @router.post("/v1/responses")
    async def create_response(body: ResponsesRequest, http: Request) -> Response:
        prepared = await service.prepare(body, http)
        if body.stream:
            return EventStream(service.stream(prepared), streams, prepared.chat.close)
        return await answer(http, service.complete(prepared), prepared.chat.close)

    @router.get("/v1/responses/{response_id}")
    async def retrieve_response(response_id: str, stream: bool = False) -> Response:
        if stream:
            raise ApiError(400, "stream=true is not supported: stored responses are whole", param="stream")
        return Response(service.stored(response_id, "response_id").body, media_type="application/json")

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str) -> Response:
        service.stored(response_id, "response_id")
        service.store.remove(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    app.include_router(router)
