"""The plain typed data that crosses borders: front end <-> engine core <-> workers.

Everything here encodes as msgpack and nothing imports torch. Structs made in numbers at every step are not tracked
by the garbage collector (gc=False): none of them can be part of a cycle.
"""

from collections.abc import Iterator

import msgspec

from atom.sampling_params import SamplingParams


class EngineRequest(msgspec.Struct, kw_only=True):
    """One sequence to generate. A user's request with n > 1 becomes n of these."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams  # with seed, max_tokens and stop_token_ids resolved
    arrival_time: float
    cache_salt: str = ""
    priority: int = 0
    grammar: str = ""  # that the answer must follow, as structured_output.grammar_of writes it


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """One position: the chosen token first, then the top candidates in falling order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the chosen token in the whole vocabulary, 1 = the most likely


class EngineOutput(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What one step added to one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | None = None  # the stop token that ended it, if one did
    new_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # for prompt positions 1.., once
    num_cached_tokens: int = 0
    error: str | None = None
    error_param: str | None = None  # the parameter of the request that is to blame, if one is


class StepOutputs(msgspec.Struct, array_like=True, gc=False):
    """What one step added to all requests. Most get a token and nothing else, which takes no object of its own.

    request_ids, token_ids: of those, one each; never a request's first token, nor its last. others: all the rest.
    Iterating gives an EngineOutput for each of either kind.
    """

    request_ids: list[str] = []
    token_ids: list[int] = []
    others: list[EngineOutput] = []

    def __len__(self) -> int:
        return len(self.request_ids) + len(self.others)

    def __iter__(self) -> Iterator[EngineOutput]:
        for request_id, token in zip(self.request_ids, self.token_ids, strict=True):
            yield EngineOutput(request_id=request_id, new_token_ids=[token])
        yield from self.others


class NewRequest(msgspec.Struct, kw_only=True):
    """Everything a worker needs to start (or, after preemption, restart) a request."""

    request_id: str
    token_ids: list[int]  # the prompt, and after a preemption the output so far
    num_prompt_tokens: int
    sampling_params: SamplingParams
    block_ids: list[int]
    num_computed_tokens: int  # prefix-cache hits


class ScheduledBatch(msgspec.Struct, kw_only=True, gc=False):
    """One step's work, as counts of tokens. Requests not named are left as they are."""

    new_requests: list[NewRequest]
    new_block_ids: dict[str, list[int]]  # request_id -> blocks that a request the worker knows got in addition
    num_scheduled_tokens: dict[str, int]  # request_id -> tokens to compute now
    removed_request_ids: list[str]  # finished, aborted or preempted: forget them first
    total_tokens: int
    token_masks: dict[str, bytes] = msgspec.field(default_factory=dict)  # request_id -> a bit a token that may come


class ModelOutput(msgspec.Struct, kw_only=True, gc=False):
    """What a step produced, in the batch's order. A request whose prompt isn't through yet has no token.

    request_ids, token_ids: of those that have, one each.
    """

    request_ids: list[str]
    token_ids: list[int]
    logprobs: dict[str, list[TokenLogprobs]] = msgspec.field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = msgspec.field(default_factory=dict)
    errors: dict[str, str] = msgspec.field(default_factory=dict)
