"""A user's prompt and parameters to engine requests: tokenize, check, fill in what was left open."""

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from atom.model_engine.outputs import unix_time
from atom.model_engine.protocol import EngineRequest
from atom.model_engine.structured_output import grammar_of
from atom.sampling_params import SamplingParams
from atom.utils.errors import RequestError
from atom.utils.strict import did_you_mean

# Text, token ids, {"prompt": text}, {"prompt_token_ids": ids}, or both: the ids run, the text is reported back.
Prompt = str | Sequence[int] | dict[str, Any]

_PROMPT_KEYS = ("prompt", "prompt_token_ids")
_CHILD_SEED_STEP = 0xD1342543DE82EF95  # odd, so that the n seeds of a request are distinct modulo 2^64


@dataclass(slots=True, kw_only=True)
class ProcessedRequest:
    """sampling_params: as the user gave them. children: one engine request for each of the n answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float
    children: list[EngineRequest]


class InputProcessor:
    """Raises RequestError for what a request alone can get wrong; keeps no state of requests.

    tokenizer: None allows prompts of token ids only.
    end_token_ids: the model's own, which end an answer unless ignore_eos.
    seed: makes requests without a seed reproducible, given their order; None draws from the system.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        *,
        vocab_size: int,
        max_model_len: int,
        end_token_ids: Sequence[int] = (),
        seed: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._end_token_ids = list(end_token_ids)
        self._seeds = random.Random(seed)

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> ProcessedRequest:
        arrival_time = unix_time()
        _require_type("request_id", request_id, str)
        _require_type("sampling_params", params, SamplingParams)
        _require_type("priority", priority, int)
        _require_type("cache_salt", cache_salt, str)
        self._check_params(params)
        grammar = self.grammar_of(params)
        text, token_ids = self._tokens_of(prompt)
        return ProcessedRequest(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            sampling_params=params,
            arrival_time=arrival_time,
            children=[
                EngineRequest(
                    request_id=child_id,
                    prompt_token_ids=token_ids,
                    sampling_params=child_params,
                    arrival_time=arrival_time,
                    cache_salt=cache_salt,
                    priority=priority,
                    grammar=grammar,
                )
                for child_id, child_params in self._expand(request_id, params, len(token_ids))
            ],
        )

    def grammar_of(self, params: SamplingParams) -> str:
        """The grammar of the structured output that is asked for, "" for none. The first time may take a while."""
        if params.structured_output is None:
            return ""
        if self.tokenizer is None:
            raise RequestError("structured_output: the model has no tokenizer", "structured_output")
        return grammar_of(params.structured_output)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; refuses one that is too long to fit before spending time on it."""
        if self.tokenizer is None:
            raise RequestError("prompt: the model has no tokenizer; give token ids instead of text", "prompt")
        # No token is longer than _longest_token, so this much text can't fit.
        if len(text) > 4 * self.max_model_len and len(text) > self.max_model_len * self._longest_token:
            raise self._too_long(f"has {len(text)} characters, which is more than")
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        except (TypeError, UnicodeEncodeError):
            raise RequestError("prompt is not valid Unicode: it contains unpaired surrogates", "prompt") from None
        return ids

    @cached_property
    def _longest_token(self) -> int:
        assert self.tokenizer is not None
        return max(map(len, self.tokenizer.get_vocab()))

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text if known, checked token ids)"""
        text: str | None = None
        given: Any = prompt
        if isinstance(prompt, dict):
            for key in prompt:
                if key not in _PROMPT_KEYS:
                    hint = did_you_mean(str(key), _PROMPT_KEYS)
                    raise RequestError(f"prompt: unknown key {key!r}{hint}; use one of {_PROMPT_KEYS}", "prompt")
            text = prompt.get("prompt")
            if text is not None:
                _require_type("prompt", text, str)
            given = prompt.get("prompt_token_ids", text)
        if isinstance(given, str):
            text = given
            token_ids = self.encode(given) if given else []
        else:
            token_ids = self._checked_ids(given)
        if not token_ids:
            raise RequestError("prompt is empty; it needs at least one token", "prompt")
        if len(token_ids) >= self.max_model_len:
            raise self._too_long(f"has {len(token_ids)} tokens, which with one to generate is more than")
        return text, token_ids

    def _checked_ids(self, given: Any) -> list[int]:
        if hasattr(given, "tolist"):  # numpy and torch
            given = given.tolist()
        if not isinstance(given, list | tuple | range):
            wanted = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
            raise RequestError(f"prompt must be {wanted}, not {type(given).__name__}", "prompt")
        ids: list[int] = list(given)
        if not set(map(type, ids)) <= {int}:
            try:
                ids = [operator.index(_not_bool(i)) for i in ids]
            except TypeError:
                wrong = next(i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__"))
                raise RequestError(f"prompt_token_ids must be integers, but one is {wrong!r}", "prompt") from None
        # Checks the length first: a huge list of nonsense is just too long.
        if len(ids) < self.max_model_len:
            self._require_in_vocabulary("prompt_token_ids", ids, param="prompt")
        return ids

    def _check_params(self, params: SamplingParams) -> None:
        self._require_in_vocabulary("stop_token_ids", params.stop_token_ids or ())
        self._require_in_vocabulary("logit_bias", params.logit_bias or ())
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > self.vocab_size:
                raise RequestError(f"{name}={count} is more than the vocabulary's {self.vocab_size} tokens", name)

    def _require_in_vocabulary(self, name: str, ids: Any, param: str | None = None) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            known = f"0 to {self.vocab_size - 1}"
            raise RequestError(f"{name}: token id {wrong} is not in the vocabulary ({known})", param or name)

    def _too_long(self, what: str) -> RequestError:
        return RequestError(f"prompt {what} max_model_len={self.max_model_len} allows", "prompt")

    def _expand(self, request_id: str, params: SamplingParams, prompt_len: int) -> list[tuple[str, SamplingParams]]:
        """The n engine requests' ids and parameters, everything resolved."""
        room = self.max_model_len - prompt_len
        stop_token_ids = list(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_token_ids += [i for i in self._end_token_ids if i not in stop_token_ids]
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        max_tokens = min(params.max_tokens, room)
        resolved = replace(  # checks the values again: the user may have assigned to fields
            params,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            stop_token_ids=stop_token_ids,
            stop_strings=None,  # matched on the text, in this process
            n=1,
            structured_output=None,  # the grammar says it
        )
        if params.n == 1:
            return [(request_id, resolved)]
        children = []
        for index in range(params.n):
            # Prompt log probabilities are the same for all: computed once. The first keeps the seed itself.
            prompt_logprobs = resolved.prompt_logprobs if index == 0 else None
            child = replace(resolved, seed=_to_int64(seed + index * _CHILD_SEED_STEP), prompt_logprobs=prompt_logprobs)
            children.append((f"{request_id}_{index}", child))
        return children


def _require_type(name: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise RequestError(f"{name} must be {wanted.__name__}, not {type(value).__name__}", name)


def _to_int64(value: int) -> int:
    """Modulo 2^64, signed: the range of SamplingParams.seed."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError
    return value
