"""What a user gets back for a request."""

import time
from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """logprob: natural logarithm of the probability before temperature, penalties and bias. rank: 1 = most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One position: the candidates by token id, the chosen token among them.
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds; arrival, first token and finish are Unix times, None until they happen."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float | None:
        """Mean time of an output token after the first; None with fewer than two. With n > 1, of all n together."""
        if self.finished_time is None or self.first_token_time is None or self.num_generation_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (self.num_generation_tokens - 1)


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n answers.

    text: without special tokens, without the stop string or stop token that ended it.
    token_ids: everything generated, the stop token included; a stop string's tokens too.
    finish_reason: "stop" | "length" | "abort" | "error"; None while it runs.
    stop_reason: the stop string or the requested stop token that ended it; None for the model's own end token.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and its answers so far; with error set, outputs may be empty.

    error_param: the parameter of the request that is to blame for the error, if one is.
    prompt_logprobs: one entry a prompt token, None for the first, which has no prediction.
    num_cached_tokens: prompt tokens that the prefix cache spared.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    error_param: str | None = None


_CLOCK_OFFSET = time.time() - time.monotonic()


def unix_time() -> float:
    """Seconds since 1970 by a clock that never jumps, so that differences are durations."""
    return time.monotonic() + _CLOCK_OFFSET
