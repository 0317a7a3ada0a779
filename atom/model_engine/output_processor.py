"""What the engine produced, as the user's outputs: text, stop strings, log probabilities, timings."""

import enum
from dataclasses import dataclass, field

from atom.model_engine.detokenizer import DetokenizerFactory, StopMatcher
from atom.model_engine.input_processor import ProcessedRequest
from atom.model_engine.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    unix_time,
)
from atom.model_engine.protocol import EngineOutput, StepOutputs, TokenLogprobs
from atom.sampling_params import SamplingParams


class OutputKind(enum.Enum):
    """When a request reports, and how much: everything so far, what is new, or just the end."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL = "final"


@dataclass(slots=True)
class StepResult:
    """request_outputs: in order of the engine's. abort_ids: engine requests that a stop string ended."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    abort_ids: list[str] = field(default_factory=list)


class OutputProcessor:
    """Holds what users have asked for and not yet got. Ids of engine requests are those of `children`."""

    def __init__(self, detokenizers: DetokenizerFactory) -> None:
        self._detokenizers = detokenizers
        self._requests: dict[str, _Request] = {}
        self._answers: dict[str, _Answer] = {}  # by engine request id

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def is_engine_id(self, request_id: str) -> bool:
        return request_id in self._answers

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add(self, processed: ProcessedRequest, kind: OutputKind) -> None:
        request = _Request(processed, kind, self._detokenizers)
        self._requests[processed.request_id] = request
        for child, answer in zip(processed.children, request.answers, strict=True):
            self._answers[child.request_id] = answer

    def process(self, outputs: StepOutputs) -> StepResult:
        """Take in one step. Outputs of requests that ended meanwhile are dropped."""
        result = StepResult()
        now = unix_time()
        changed: dict[_Request, None] = {}  # a set that keeps its order
        for request_id, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
            answer = self._answers.get(request_id)
            if answer is None:
                continue
            request = answer.request
            request.metrics.num_generation_tokens += 1
            answer.take_token(token)
            if answer.finish_reason is not None:
                del self._answers[request_id]
                result.abort_ids.append(request_id)
            elif request.kind is OutputKind.FINAL:
                continue
            changed[request] = None
        for output in outputs.others:
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            request = answer.request
            request.accept(output, answer, now)
            if answer.finish_reason is not None:
                del self._answers[output.request_id]
                if output.finish_reason is None:
                    result.abort_ids.append(output.request_id)
            changed[request] = None
        for request in changed:
            if request.finished:
                request.metrics.finished_time = now
                del self._requests[request.processed.request_id]
            elif request.kind is OutputKind.FINAL:
                continue
            result.request_outputs.append(request.report())
        return result

    def abort(self, request_id: str) -> tuple[RequestOutput | None, list[str]]:
        """Forget a request: (its last output, engine requests to abort); (None, []) if it isn't running."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None, []
        engine_ids = []
        for child, answer in zip(request.processed.children, request.answers, strict=True):
            if answer.finish_reason is None:
                answer.finish("abort")
                del self._answers[child.request_id]
                engine_ids.append(child.request_id)
        request.metrics.finished_time = unix_time()
        return request.report(), engine_ids


class _Request:
    """A user's request and its n answers."""

    __slots__ = (
        "answers",
        "detokenizers",
        "error",
        "error_param",
        "kind",
        "metrics",
        "num_cached_tokens",
        "processed",
        "prompt_logprobs",
    )

    def __init__(self, processed: ProcessedRequest, kind: OutputKind, detokenizers: DetokenizerFactory) -> None:
        self.processed = processed
        self.kind = kind
        self.detokenizers = detokenizers
        self.metrics = RequestMetrics(processed.arrival_time)
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self.error: str | None = None
        self.error_param: str | None = None
        self.answers = [_Answer(self, index) for index in range(len(processed.children))]

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    def accept(self, output: EngineOutput, answer: "_Answer", now: float) -> None:
        if output.new_token_ids and self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            limit = self.processed.sampling_params.prompt_logprobs or 0
            self.prompt_logprobs = [None, *(self.position_logprobs(p, limit) for p in output.prompt_logprobs)]
        if output.error is not None:
            self.error, self.error_param = output.error, output.error_param
        before = len(answer.token_ids)
        answer.accept(output)
        self.metrics.num_generation_tokens += len(answer.token_ids) - before

    def position_logprobs(self, position: TokenLogprobs, limit: int) -> PositionLogprobs:
        """At most `limit` candidates beside the chosen token."""
        text = self.detokenizers.token_text
        tokens, values = position.token_ids, position.logprobs
        result = {tokens[0]: Logprob(values[0], position.rank, text(tokens[0]))}
        for rank, (token, value) in enumerate(zip(tokens[1 : limit + 1], values[1 : limit + 1], strict=True), start=1):
            if token != tokens[0]:
                result[token] = Logprob(value, rank, text(token))
        return result

    def report(self) -> RequestOutput:
        if self.kind is OutputKind.DELTA:
            outputs = [answer.delta() for answer in self.answers if answer.has_news]
        else:
            outputs = [answer.total() for answer in self.answers]
        processed = self.processed
        return RequestOutput(
            request_id=processed.request_id,
            prompt=processed.prompt,
            prompt_token_ids=processed.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
            error_param=self.error_param,
        )


class _Answer:
    """One of the n answers as it grows."""

    __slots__ = (
        "cumulative_logprob",
        "decoder",
        "finish_reason",
        "index",
        "logprobs",
        "matcher",
        "min_tokens",
        "num_reported_tokens",
        "pieces",
        "reported_finish",
        "request",
        "stop_reason",
        "token_ids",
        "user_stop_ids",
    )

    def __init__(self, request: _Request, index: int) -> None:
        params: SamplingParams = request.processed.sampling_params
        self.request = request
        self.index = index
        self.decoder = request.detokenizers.decoder(params.skip_special_tokens)
        self.matcher = StopMatcher(params.stop_strings) if params.stop_strings else None
        self.min_tokens = params.min_tokens
        self.user_stop_ids = params.stop_token_ids or ()
        self.token_ids: list[int] = []
        self.pieces: list[str] = []  # of text that may be shown
        self.logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.num_reported_tokens = 0
        self.reported_finish = False

    def accept(self, output: EngineOutput) -> None:
        tokens = output.new_token_ids
        # The stop token that ended it is no text, even where it isn't special.
        num_text_tokens = len(tokens) - (output.finish_reason == "stop" and output.stop_reason is not None)
        for i, token in enumerate(tokens):
            self.token_ids.append(token)
            if self.logprobs is not None and output.new_logprobs is not None:
                self._add_logprobs(output.new_logprobs[i])
            if i < num_text_tokens and self._add_text(self.decoder.push(token)):
                return  # what follows in this step was generated after the stop string
        if output.finish_reason is not None:
            stop = output.stop_reason
            self.finish(output.finish_reason, stop if stop in self.user_stop_ids else None)

    def take_token(self, token: int) -> None:
        """A token and nothing else: `accept` in short, for almost all that come."""
        self.token_ids.append(token)
        self._add_text(self.decoder.push(token))

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """No more tokens come: release what is held back."""
        if self._add_text(self.decoder.flush()):
            return
        if self.matcher is not None:
            self.pieces.append(self.matcher.flush())
        self.finish_reason, self.stop_reason = reason, stop_reason

    def _add_text(self, text: str) -> bool:
        """True if a stop string was completed, which finishes the answer."""
        if not text:
            return False
        found = None
        if self.matcher is not None:
            text, found = self.matcher.push(text, armed=len(self.token_ids) >= self.min_tokens)
        self.pieces.append(text)
        if found is None:
            return False
        self.finish_reason, self.stop_reason = "stop", found
        return True

    def _add_logprobs(self, position: TokenLogprobs) -> None:
        assert self.logprobs is not None
        assert self.cumulative_logprob is not None
        limit = self.request.processed.sampling_params.logprobs or 0
        self.logprobs.append(self.request.position_logprobs(position, limit))
        self.cumulative_logprob += position.logprobs[0]

    @property
    def has_news(self) -> bool:
        return len(self.token_ids) > self.num_reported_tokens or self.reported_finish != (
            self.finish_reason is not None
        )

    def total(self) -> CompletionOutput:
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self._output(
            "".join(self.pieces), self.token_ids[:], None if self.logprobs is None else self.logprobs[:]
        )

    def delta(self) -> CompletionOutput:
        """What came since the last one."""
        text, self.pieces = "".join(self.pieces), []
        start, self.num_reported_tokens = self.num_reported_tokens, len(self.token_ids)
        self.reported_finish = self.finish_reason is not None
        logprobs = None if self.logprobs is None else self.logprobs[start:]
        return self._output(text, self.token_ids[start:], logprobs)

    def _output(self, text: str, token_ids: list[int], logprobs: list[PositionLogprobs] | None) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=logprobs,
        )
