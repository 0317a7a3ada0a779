"""/v1/completions: one or many prompts, each continued n times."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from atom.entrypoints.openai.context import ServingContext, answer_id, check_priority, usage
from atom.entrypoints.openai.errors import ApiError
from atom.entrypoints.openai.protocol import UNLIMITED_TOKENS, CompletionRequest
from atom.entrypoints.openai.streaming import DONE, event
from atom.entrypoints.openai.structured import checked, structured_output_of
from atom.model_engine.async_llm_engine import RequestStream, Signal
from atom.model_engine.input_processor import Prompt
from atom.model_engine.output_processor import OutputKind
from atom.model_engine.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from atom.sampling_params import SamplingParams
from atom.utils.errors import RequestError

MAX_PROMPTS = 1024


@dataclass
class Prepared:
    """A completion whose requests are queued. Close it."""

    request: CompletionRequest
    id: str
    model: str
    created: int
    params: SamplingParams
    signal: Signal
    streams: list[RequestStream] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # their texts, with echo
    drops_answer: bool = False  # max_tokens=0: only the prompt is wanted

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


class CompletionService:
    def __init__(self, context: ServingContext) -> None:
        self._context = context

    async def prepare(self, request: CompletionRequest, http: Request | None = None) -> Prepared:
        """Check everything and queue the requests. ApiError, RequestError."""
        context = self._context
        model = context.check_model(request.model)
        check_priority(request.priority)
        if request.suffix:
            raise RequestError("suffix is not supported", "suffix")
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise RequestError("best_of is not supported, unless it equals n", "best_of")
        drops_answer = request.max_tokens == 0 and bool(request.echo)
        prompt_logprobs = request.prompt_logprobs
        if request.echo and request.logprobs is not None and prompt_logprobs is None:
            prompt_logprobs = request.logprobs
        fixed: dict[str, Any] = {"logprobs": request.logprobs, "prompt_logprobs": prompt_logprobs}
        if drops_answer:
            fixed["max_tokens"] = 1
        else:
            fixed["max_tokens"] = UNLIMITED_TOKENS if request.max_tokens is None else request.max_tokens
        fixed["structured_output"] = await checked(context.engine, *structured_output_of(request))
        params = request.make_sampling_params(**fixed)
        prepared = Prepared(
            request=request,
            id=answer_id("cmpl", http),
            model=model,
            created=int(time.time()),
            params=params,
            signal=Signal(),
            drops_answer=drops_answer,
        )
        kind = OutputKind.DELTA if request.stream else OutputKind.FINAL
        try:
            for index, prompt in enumerate(await self._prompts(request)):
                stream = await context.submit(
                    prompt,
                    params,
                    f"{prepared.id}-{index}",
                    kind=kind,
                    priority=request.priority,
                    cache_salt=request.cache_salt,
                    signal=prepared.signal,
                )
                prepared.streams.append(stream)
                if request.echo:
                    prepared.prompts.append(self._text_of(prompt, stream.prompt_token_ids))
        except BaseException:
            prepared.close()
            raise
        return prepared

    async def complete(self, prepared: Prepared) -> dict[str, Any]:
        """The whole answer."""
        try:
            outputs: dict[int, RequestOutput] = {}
            async for index, output in each_output(prepared.streams, prepared.signal):
                outputs[index] = output
        finally:
            prepared.close()
        choices, num_completion, num_cached, num_prompt = [], 0, 0, 0
        n = prepared.params.n
        for index, output in outputs.items():
            raise_error_of(output)
            num_prompt += len(output.prompt_token_ids)
            num_cached += output.num_cached_tokens
            for answer in output.outputs:
                num_completion += 0 if prepared.drops_answer else len(answer.token_ids)
                offset = _Offsets()
                echo = self._echo(prepared, index, output, offset) if prepared.request.echo else None
                choices.append(self._choice(prepared, index * n + answer.index, answer, output, echo, offset))
        choices.sort(key=lambda choice: choice["index"])
        return {
            "id": prepared.id,
            "object": "text_completion",
            "created": prepared.created,
            "model": prepared.model,
            "choices": choices,
            "usage": usage(num_prompt, num_completion, num_cached),
        }

    async def stream(self, prepared: Prepared) -> AsyncGenerator[bytes, None]:
        """Server-sent events."""
        request, n = prepared.request, prepared.params.n
        head = {
            "id": prepared.id,
            "object": "text_completion",
            "created": prepared.created,
            "model": prepared.model,
        }
        started: set[int] = set()
        offsets: dict[int, _Offsets] = {}
        num_completion = num_cached = 0
        num_prompt = sum(len(stream.prompt_token_ids) for stream in prepared.streams)
        continuous = request.include_usage and request.stream_options and request.stream_options.continuous_usage_stats
        try:
            async for index, output in each_output(prepared.streams, prepared.signal):
                raise_error_of(output)
                data = b""
                for answer in output.outputs:
                    choice_index = index * n + answer.index
                    offset = offsets.setdefault(choice_index, _Offsets())
                    echo = None
                    if choice_index not in started:
                        started.add(choice_index)
                        if answer.index == 0:
                            num_cached += output.num_cached_tokens
                        if request.echo:
                            echo = self._echo(prepared, index, output, offset)
                    num_completion += 0 if prepared.drops_answer else len(answer.token_ids)
                    choice = self._choice(prepared, choice_index, answer, output, echo, offset)
                    chunk = head | {"choices": [choice]}
                    if request.include_usage:
                        chunk["usage"] = usage(num_prompt, num_completion, num_cached) if continuous else None
                    data += event(chunk)
                if data:
                    yield data
            if request.include_usage:
                yield event(head | {"choices": [], "usage": usage(num_prompt, num_completion, num_cached)})
            yield DONE
        finally:
            prepared.close()

    async def _prompts(self, request: CompletionRequest) -> list[Prompt]:
        given = request.prompt
        if isinstance(given, str):
            items: list[Any] = [given]
        elif given and isinstance(given[0], int):
            items = [given]
        else:
            items = list(given)
        if not items:
            raise RequestError("prompt is empty; it needs at least one token", "prompt")
        if len(items) > MAX_PROMPTS:
            raise RequestError(f"prompt has {len(items)} prompts; at most {MAX_PROMPTS} are allowed", "prompt")
        if request.add_special_tokens:
            return items
        encode = self._context.engine.encode
        return [
            {"prompt": item, "prompt_token_ids": await encode(item, False)} if isinstance(item, str) else item
            for item in items
        ]

    def _text_of(self, prompt: Prompt, token_ids: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, dict):
            return str(prompt["prompt"])
        tokenizer = self._context.engine.tokenizer
        return str(tokenizer.decode(token_ids)) if tokenizer is not None else ""

    def _echo(self, prepared: Prepared, index: int, output: RequestOutput, offset: "_Offsets") -> "_Echo":
        """The prompt as the beginning of an answer, with its log probabilities if they were asked for."""
        text = prepared.prompts[index]
        logprobs = None
        if prepared.request.logprobs is not None and output.prompt_logprobs is not None:
            name = self._context.engine.detokenizers.token_text
            limit = prepared.request.logprobs
            logprobs = _Logprobs()
            for token_id, position in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
                logprobs.add(name(token_id), token_id, position, limit, offset)
        return _Echo(text, logprobs)

    def _choice(
        self,
        prepared: Prepared,
        index: int,
        answer: CompletionOutput,
        output: RequestOutput,
        echo: "_Echo | None",
        offset: "_Offsets",
    ) -> dict[str, Any]:
        request = prepared.request
        text = "" if prepared.drops_answer else answer.text
        logprobs = echo.logprobs if echo is not None else None
        if answer.logprobs is not None and not prepared.drops_answer:
            logprobs = logprobs or _Logprobs()
            name = self._context.engine.detokenizers.token_text
            for token_id, position in zip(answer.token_ids, answer.logprobs, strict=True):
                logprobs.add(name(token_id), token_id, position, request.logprobs or 0, offset)
        choice: dict[str, Any] = {
            "index": index,
            "text": echo.text + text if echo is not None else text,
            "logprobs": logprobs.as_dict() if logprobs is not None else None,
            "finish_reason": answer.finish_reason,
        }
        if answer.stop_reason is not None:
            choice["stop_reason"] = answer.stop_reason
        if request.return_token_ids:
            choice["token_ids"] = answer.token_ids
            if not request.stream or echo is not None:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if request.prompt_logprobs is not None and not request.stream:
            choice["prompt_logprobs"] = [
                None if p is None else {str(i): _logprob_dict(v) for i, v in p.items()}
                for p in output.prompt_logprobs or []
            ]
        return choice


async def each_output(streams: list[RequestStream], signal: Signal) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(which stream, its output) of streams that share a signal, until all have ended."""
    open_streams = dict(enumerate(streams))
    while open_streams:
        idle = True
        for index, stream in list(open_streams.items()):
            output = stream.take()
            if output is not None:
                idle = False
                if output.finished:
                    del open_streams[index]
                yield index, output
        if idle:
            await signal.wait()


def raise_error_of(output: RequestOutput) -> None:
    """An error that the engine met while it computed this request."""
    if output.error is not None:
        if output.error_param is not None:
            raise RequestError(output.error, output.error_param)
        raise ApiError(500, output.error, code="engine_error")


class _Offsets:
    """Where the next token's text begins."""

    __slots__ = ("position",)

    def __init__(self) -> None:
        self.position = 0


class _Logprobs:
    """The four parallel lists of OpenAI's completions."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.values: list[float | None] = []
        self.tops: list[dict[str, float] | None] = []
        self.offsets: list[int] = []

    def add(self, text: str, token_id: int, position: PositionLogprobs | None, limit: int, offset: _Offsets) -> None:
        self.tokens.append(text)
        self.offsets.append(offset.position)
        offset.position += len(text)
        if position is None:
            self.values.append(None)
            self.tops.append(None)
            return
        self.values.append(finite(position[token_id].logprob))
        top: dict[str, float] = {}
        for candidate, value in position.items():
            if candidate == token_id or (value.rank or 0) <= limit:
                top.setdefault(value.decoded_token or str(candidate), finite(value.logprob))
        self.tops.append(top)

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.values,
            "top_logprobs": self.tops,
            "text_offset": self.offsets,
        }


@dataclass
class _Echo:
    text: str
    logprobs: _Logprobs | None


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what can't happen."""
    return max(logprob, -9999.0)


def _logprob_dict(value: Any) -> dict[str, Any]:
    return {"logprob": finite(value.logprob), "rank": value.rank, "decoded_token": value.decoded_token}
