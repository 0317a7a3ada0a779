"""Chat: a conversation to structured deltas (role, reasoning, content, tool calls), and these as /v1/chat/completions.

`ChatService` knows no wire format: other protocols (responses, messages) are written on top of
`prepare`, `deltas` and `complete`.
"""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from atom.entrypoints.openai.chat_template import ChatTemplate
from atom.entrypoints.openai.context import ServingContext, answer_id, check_priority, usage
from atom.entrypoints.openai.deltas import ChatAnswer, ChatDelta, ReasoningParser, ToolCallDelta, ToolParser
from atom.entrypoints.openai.parsers import ParserFactory, get_reasoning_parser, get_tool_parser
from atom.entrypoints.openai.parsers.forced_tools import forced_tool_parser, schema_for
from atom.entrypoints.openai.protocol import UNLIMITED_TOKENS, ChatCompletionRequest, NamedToolChoice
from atom.entrypoints.openai.serving_completion import finite, raise_error_of
from atom.entrypoints.openai.streaming import DONE, event
from atom.entrypoints.openai.structured import checked, structured_output_of
from atom.model_engine.async_llm_engine import RequestStream
from atom.model_engine.output_processor import OutputKind
from atom.model_engine.outputs import CompletionOutput
from atom.utils.errors import RequestError


@dataclass(slots=True)
class PreparedChat:
    """A chat whose request is queued. Close it, whatever happens."""

    request: ChatCompletionRequest
    id: str
    model: str
    created: int
    stream: RequestStream
    prompt_text: str
    num_prompt_tokens: int
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        return usage(self.num_prompt_tokens, self.num_completion_tokens, self.num_cached_tokens)

    def close(self) -> None:
        self.stream.close()


class ChatService:
    def __init__(self, context: ServingContext) -> None:
        self.context = context
        tokenizer = context.engine.tokenizer
        self.template = ChatTemplate(context.engine, context.settings.chat_template)
        reasoning, tools = context.settings.reasoning_parser, context.settings.tool_call_parser
        self._make_reasoning_parser = get_reasoning_parser(reasoning, tokenizer) if reasoning else None
        self._make_tool_parser = get_tool_parser(tools, tokenizer) if tools else None

    async def prepare(
        self, request: ChatCompletionRequest, http: Request | None = None, *, id_prefix: str = "chatcmpl"
    ) -> PreparedChat:
        """Check everything, render the template, queue the request. ApiError, RequestError."""
        context = self.context
        model = context.check_model(request.model)
        check_priority(request.priority)
        self._check_tools(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError("top_logprobs needs logprobs=true beside it", "top_logprobs")
        most = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        fixed: dict[str, Any] = {
            "max_tokens": UNLIMITED_TOKENS if most is None else most,
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        }
        if any(factory.needs_special_tokens for factory in self._factories(request)):
            fixed["skip_special_tokens"] = False
        kwargs = dict(request.chat_template_kwargs or {})
        if request.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", request.reasoning_effort)
        context.check_queue()  # before spending time on the template
        prompt = await self.template.prompt(
            request.messages,
            request.usable_tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
            template_kwargs=kwargs,
        )
        fixed["structured_output"] = await self._structure(request, prompt["prompt"])
        params = request.make_sampling_params(**fixed)
        chat_id = answer_id(id_prefix, http)
        stream = await context.submit(
            prompt,
            params,
            chat_id,
            # Parsers see the text as it grows; without any, the whole answer may come at once.
            kind=OutputKind.DELTA if request.stream else OutputKind.FINAL,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        return PreparedChat(
            request=request,
            id=chat_id,
            model=model,
            created=int(time.time()),
            stream=stream,
            prompt_text=prompt["prompt"],
            num_prompt_tokens=len(stream.prompt_token_ids),
        )

    async def deltas(self, chat: PreparedChat) -> AsyncIterator[list[ChatDelta]]:
        """What each step brings, until every answer has its finish_reason. Raises what ended the request early."""
        parsers: dict[int, _AnswerParser] = {}
        try:
            async for output in chat.stream:
                raise_error_of(output)
                chat.num_cached_tokens = output.num_cached_tokens
                news = []
                for answer in output.outputs:
                    chat.num_completion_tokens += len(answer.token_ids)
                    parser = parsers.get(answer.index)
                    if parser is None:
                        parser = parsers[answer.index] = self._parser(chat)
                    news.append(parser.take(answer))
                if news:
                    yield news
        finally:
            chat.close()

    async def complete(self, chat: PreparedChat) -> list[ChatAnswer]:
        """All answers, whole, in order."""
        answers: dict[int, ChatAnswer] = {}
        async for news in self.deltas(chat):
            for delta in news:
                answers.setdefault(delta.index, ChatAnswer(delta.index)).add(delta)
        return [answers[index] for index in sorted(answers)]

    def _check_tools(self, request: ChatCompletionRequest) -> None:
        choice = request.tool_choice
        if choice in (None, "none", "auto") and not request.tools:
            return
        if not request.tools:
            raise RequestError("tool_choice needs tools beside it", "tool_choice")
        if isinstance(choice, NamedToolChoice) and choice.function.name not in [t.function.name for t in request.tools]:
            raise RequestError(f"tool_choice: {choice.function.name!r:.100} is not one of the tools", "tool_choice")

    def _factories(self, request: ChatCompletionRequest) -> list[ParserFactory]:
        """Of the parsers that will read an answer, but for those of calls that are demanded."""
        tools = self._make_tool_parser if request.usable_tools else None
        return [factory for factory in (self._make_reasoning_parser, tools) if factory is not None]

    async def _structure(self, request: ChatCompletionRequest, prompt_text: str) -> dict[str, Any] | None:
        """What the answer is held to, once its reasoning is over."""
        structure, field = structured_output_of(request)
        schema = schema_for(request)  # a demanded call goes before the form of other answers
        if schema is not None:
            await checked(self.context.engine, structure, field)  # overruled, but wrong all the same
            structure, field = {"json": schema}, "tools"
        if structure is not None and self._make_reasoning_parser is not None:
            reasoning = self._make_reasoning_parser(request, prompt_text)
            if reasoning.thinks is not False:
                structure = structure | {"after": reasoning.closing}
                if reasoning.thinks is None:
                    structure["opening"] = reasoning.opening
        return await checked(self.context.engine, structure, field)

    def _parser(self, chat: PreparedChat) -> "_AnswerParser":
        """Of an answer. Without a tool parser the model sees the tools, but calls it makes unasked stay text."""
        request, text = chat.request, chat.prompt_text
        tools = forced_tool_parser(request)
        if tools is None and request.usable_tools and self._make_tool_parser is not None:
            tools = self._make_tool_parser(request, text)
        return _AnswerParser(
            self._make_reasoning_parser(request, text) if self._make_reasoning_parser else None,
            tools,
            one_call=request.parallel_tool_calls is False,
        )


class _AnswerParser:
    """Splits the text of one answer."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, one_call: bool = False) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._one_call = one_call
        self._called = False

    def take(self, answer: CompletionOutput) -> ChatDelta:
        delta = ChatDelta(
            answer.index,
            stop_reason=answer.stop_reason,
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
        )
        ended = answer.finish_reason is not None
        content = answer.text
        if self._reasoning is not None:
            delta.reasoning_content, content = self._reasoning.push(content)
            if ended:
                reasoning, rest = self._reasoning.flush()
                delta.reasoning_content += reasoning
                content += rest
        if self._tools is not None:
            text, calls = self._tools.push(content)
            if ended:
                rest, more = self._tools.flush()
                text, calls = text + rest, [*calls, *more]
            content = text
            delta.tool_calls = [self._named(call) for call in calls if not (self._one_call and call.index > 0)]
            self._called = self._called or bool(calls)
        delta.content = content
        if ended:
            delta.finish_reason = (
                "tool_calls" if self._called and answer.finish_reason == "stop" else answer.finish_reason
            )
        return delta

    def _named(self, call: ToolCallDelta) -> ToolCallDelta:
        call_id = call.id
        if call.name is not None and call_id is None:
            call_id = f"call_{uuid.uuid4().hex[:24]}"
        return ToolCallDelta(call.index, call_id, call.name, call.arguments or "")


class ChatCompletions:
    """/v1/chat/completions on top of ChatService."""

    def __init__(self, service: ChatService) -> None:
        self.service = service

    async def complete(self, chat: PreparedChat) -> dict[str, Any]:
        answers = await self.service.complete(chat)
        return {
            "id": chat.id,
            "object": "chat.completion",
            "created": chat.created,
            "model": chat.model,
            "choices": [self._choice(chat, answer) for answer in answers],
            "usage": chat.usage(),
        }

    async def stream(self, chat: PreparedChat) -> AsyncGenerator[bytes, None]:
        """Server-sent events."""
        request = chat.request
        head: dict[str, Any] = {
            "id": chat.id,
            "object": "chat.completion.chunk",
            "created": chat.created,
            "model": chat.model,
        }
        if request.include_usage:
            head["usage"] = None
        started: set[int] = set()
        try:
            async for news in self.service.deltas(chat):
                data = b""
                for delta in news:
                    if delta.index not in started:
                        started.add(delta.index)
                        first = {"role": "assistant", "content": ""}
                        data += event(head | {"choices": [_chunk_choice(delta.index, first)]})
                    data += self._event(head, delta, request)
                yield data
            if request.include_usage:
                yield event(head | {"choices": [], "usage": chat.usage()})
            yield DONE
        finally:
            chat.close()

    def _event(self, head: dict[str, Any], delta: ChatDelta, request: ChatCompletionRequest) -> bytes:
        """b"" where nothing is to be told (text that is still held back)."""
        body: dict[str, Any] = {}
        if delta.content:
            body["content"] = delta.content
        if delta.reasoning_content and request.include_reasoning:
            body["reasoning_content"] = delta.reasoning_content
        if delta.tool_calls:
            body["tool_calls"] = [_tool_call_chunk(call) for call in delta.tool_calls]
        if not body and delta.finish_reason is None and delta.logprobs is None and not request.return_token_ids:
            return b""
        choice = _chunk_choice(delta.index, body, delta.finish_reason)
        if delta.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta, request)
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return event(head | {"choices": [choice]})

    def _choice(self, chat: PreparedChat, answer: ChatAnswer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning_content and chat.request.include_reasoning:
            message["reasoning_content"] = answer.reasoning_content
        if answer.tool_calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.tool_calls
            ]
        choice: dict[str, Any] = {
            "index": answer.index,
            "message": message,
            "logprobs": None if answer.logprobs is None else self._logprobs(answer, chat.request),
            "finish_reason": answer.finish_reason,
        }
        if answer.stop_reason is not None:
            choice["stop_reason"] = answer.stop_reason
        if chat.request.return_token_ids:
            choice["token_ids"] = answer.token_ids
            choice["prompt_token_ids"] = chat.stream.prompt_token_ids
        return choice

    def _logprobs(self, part: ChatDelta | ChatAnswer, request: ChatCompletionRequest) -> dict[str, Any]:
        limit = request.top_logprobs or 0
        content = []
        for token_id, position in zip(part.token_ids, part.logprobs or [], strict=True):
            ranked = sorted(position.values(), key=lambda value: value.rank or 0)
            entry = _logprob_entry(position[token_id])
            entry["top_logprobs"] = [_logprob_entry(value) for value in ranked if (value.rank or 0) <= limit]
            content.append(entry)
        return {"content": content, "refusal": None}


def _chunk_choice(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _tool_call_chunk(call: ToolCallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprob_entry(value: Any) -> dict[str, Any]:
    token = value.decoded_token or ""
    return {"token": token, "logprob": finite(value.logprob), "bytes": list(token.encode())}
