"""/v1/messages: Anthropic's Messages on top of the chat service."""

import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRouter

from atom.entrypoints.openai.conversion import errors_named, reasoning_tokens
from atom.entrypoints.openai.errors import as_api_error
from atom.entrypoints.openai.messages_events import MessageEvents, content_of, sse, stop_of
from atom.entrypoints.openai.messages_protocol import NAMES, CountTokensRequest, MessagesRequest
from atom.entrypoints.openai.routing import JsonRoute, answer
from atom.entrypoints.openai.serving_chat import ChatService, PreparedChat
from atom.entrypoints.openai.streaming import EventStream

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is wrong: {type: 'error', error: {type, message}, request_id}"},
    "5XX": {"description": "The server or its engine failed"},
}


class MessagesService:
    def __init__(self, chats: ChatService) -> None:
        self._chats = chats

    async def prepare(self, request: MessagesRequest, http: Request) -> PreparedChat:
        """Check everything and queue the chat. ApiError, RequestError."""
        with errors_named(NAMES):
            return await self._chats.prepare(request.chat(), http, id_prefix="msg")

    async def complete(self, request: MessagesRequest, chat: PreparedChat) -> dict[str, Any]:
        (whole,) = await self._chats.complete(chat)
        usage = await self._usage(chat, whole.reasoning_content)
        return _message(chat, content_of(whole, request.thinks), usage) | stop_of(whole)

    async def stream(self, request: MessagesRequest, chat: PreparedChat) -> AsyncGenerator[bytes, None]:
        """Server-sent events."""
        events = MessageEvents(request.thinks)
        try:
            # What the prefix cache had is not known yet: message_delta corrects it.
            start = _message(chat, [], {"input_tokens": chat.num_prompt_tokens, "output_tokens": 0})
            yield sse("message_start", {"message": start}) + sse("ping", {})
            async for news in self._chats.deltas(chat):
                data = b"".join(events.delta(delta) for delta in news)
                if data:
                    yield data
            assert events.last is not None
            usage = await self._usage(chat, events.reasoning)
            yield sse("message_delta", {"delta": stop_of(events.last), "usage": usage}) + sse("message_stop", {})
        except Exception as error:
            yield sse("error", as_api_error(error).anthropic_body())
        finally:
            chat.close()

    async def count_tokens(self, request: CountTokensRequest) -> dict[str, Any]:
        self._chats.context.check_model(request.model)
        with errors_named(NAMES):
            chat = request.chat()
            prompt = await self._chats.template.prompt(
                chat.messages,
                chat.usable_tools,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                template_kwargs=chat.chat_template_kwargs,
            )
        return {"input_tokens": len(prompt["prompt_token_ids"])}

    async def _usage(self, chat: PreparedChat, reasoning: str) -> dict[str, Any]:
        num_thinking = await reasoning_tokens(self._chats.context, reasoning, chat.num_completion_tokens)
        return {
            "input_tokens": chat.num_prompt_tokens - chat.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": chat.num_cached_tokens,
            "output_tokens": chat.num_completion_tokens,
            "output_tokens_details": {"thinking_tokens": num_thinking},
        }


def _message(chat: PreparedChat, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": chat.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def mount(app: FastAPI) -> None:
    service = MessagesService(app.state.chat)
    streams = app.state.context.streams
    router = APIRouter(route_class=JsonRoute, responses=_ERRORS)

    @router.post("/v1/messages")
    async def create_message(body: MessagesRequest, http: Request) -> Response:
        chat = await service.prepare(body, http)
        if body.stream:
            response: Response = EventStream(service.stream(body, chat), streams, chat.close)
        else:
            response = await answer(http, service.complete(body, chat), chat.close)
        response.headers["request-id"] = http.state.request_id  # where Anthropic's clients look for it
        return response

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest, http: Request) -> Response:
        return JSONResponse(await service.count_tokens(body), headers={"request-id": http.state.request_id})

    app.include_router(router)
