"""What a request asks of the sampler, and when it ends."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from atom.utils.errors import RequestError
from atom.utils.strict import did_you_mean

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_LISTED_TOKENS = 1024  # of stop_token_ids and of logit_bias
STRUCTURES = ("json", "json_object", "regex", "choice", "grammar")
MAX_CHOICES = 4096
GREEDY_BELOW = 1e-5  # a lower temperature would overflow the scaled logits and means the same as 0


@dataclass(init=False)
class SamplingParams:
    """Per-request generation parameters; values are checked and numbers brought to plain int and float.

    temperature: >= 0; 0 (and anything below 1e-5) is greedy. max_tokens: tokens to generate at most.
    ignore_eos: go on past the model's end tokens; stop_token_ids and stop_strings still end the text.
    stop_strings: the text ends before the first of them to appear; `stop` is another name for it and
    also takes one string. top_k: 0 or -1 = off. top_p: 1 = off. min_p: 0 = off.
    seed: equal seeds give equal tokens whatever else runs; None = a new one each request.
    presence_, frequency_penalty: -2..2, on tokens generated so far; repetition_penalty: > 0, on those
    and the prompt's, 1 = off. min_tokens: no end before that many. logprobs, prompt_logprobs: how many
    top candidates to report (0..20) beside the token itself; None = none. n: completions a prompt.
    skip_special_tokens: leave them out of the text (an end token is never part of it).
    logit_bias: token id -> value in -100..100 added to its logit.
    structured_output: the form of the answer, one of {"json": schema}, {"json_object": True}, {"regex": text},
    {"choice": texts} and {"grammar": text (GBNF or Lark)}. "after" beside it is a text ("</think>") that ends a
    free part before it; with "opening", there is such a part only where the answer begins with that.
    Raises RequestError, whose `param` names the field.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    stop_strings: list[str] | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] = field(default_factory=list)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    structured_output: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "SamplingParams":
        known = cls.__dataclass_fields__
        for name in kwargs:
            if name not in known and name != "stop":
                raise RequestError(f"unknown sampling parameter {name!r}{did_you_mean(name, [*known, 'stop'])}", name)
        return super().__new__(cls)

    # Written out so that `stop` can be a keyword without being a field (msgspec transports the fields).
    def __init__(
        self,
        temperature: float = 1.0,
        max_tokens: int = 64,
        ignore_eos: bool = False,
        stop_strings: str | list[str] | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_token_ids: list[int] | None = None,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        n: int = 1,
        skip_special_tokens: bool = True,
        logit_bias: Mapping[int, float] | None = None,
        structured_output: dict[str, Any] | None = None,
        *,
        stop: str | list[str] | None = None,
    ) -> None:
        if stop is not None and stop_strings is not None:
            raise RequestError("give stop or stop_strings, not both: they are the same parameter", "stop_strings")
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.ignore_eos = ignore_eos
        self.stop_strings = stop if stop_strings is None else stop_strings  # type: ignore[assignment]
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.seed = seed
        self.presence_penalty = presence_penalty
        self.frequency_penalty = frequency_penalty
        self.repetition_penalty = repetition_penalty
        self.stop_token_ids = [] if stop_token_ids is None else stop_token_ids
        self.min_tokens = min_tokens
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.n = n
        self.skip_special_tokens = skip_special_tokens
        self.logit_bias = logit_bias  # type: ignore[assignment]
        self.structured_output = structured_output
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check every field; also run by msgspec when it decodes."""
        self.temperature = _real("temperature", self.temperature, 0, 100)
        if self.temperature < GREEDY_BELOW:
            self.temperature = 0.0
        self.max_tokens = _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} must be true or false", name)
        self.stop_strings = _stop_strings(self.stop_strings)
        self.top_p = _real("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p=0 must be above 0 (for greedy decoding set temperature=0)", "top_p")
        self.top_k = max(0, _integer("top_k", self.top_k, -1, 2**31 - 1))
        self.min_p = _real("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            self.seed = _integer("seed", self.seed, -(2**63), 2**64 - 1)
        self.presence_penalty = _real("presence_penalty", self.presence_penalty, -2, 2)
        self.frequency_penalty = _real("frequency_penalty", self.frequency_penalty, -2, 2)
        self.repetition_penalty = _real("repetition_penalty", self.repetition_penalty, 0, 100)
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty=0 must be above 0 (1 = off)", "repetition_penalty")
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        self.min_tokens = _integer("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}", "min_tokens")
        if self.logprobs is not None:
            self.logprobs = _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self.n = _integer("n", self.n, 1, MAX_N)
        self.logit_bias = _logit_bias(self.logit_bias)
        self.structured_output = _structured_output(self.structured_output)


def _real(name: str, value: Any, low: float, high: float, param: str | None = None) -> float:
    param = param or name
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise RequestError(f"{name}={value!r} must be a number", param)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not low <= value <= high:  # false for NaN as well
        raise RequestError(f"{name}={value!r} must be between {low:g} and {high:g}", param)
    return value


def _integer(name: str, value: Any, low: int, high: int | None = None, param: str | None = None) -> int:
    param = param or name
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise RequestError(f"{name}={value!r} must be an integer", param)
        value = int(value)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name}={value} must be {bounds}", param)
    return value


def _token_ids(name: str, value: Any) -> list[int]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name}={value!r} must be a list of token ids", name)
    ids = [_integer(name, v, 0, 2**31 - 1) for v in value]
    if len(ids) > MAX_LISTED_TOKENS:
        raise RequestError(f"{name} lists {len(ids)} tokens; at most {MAX_LISTED_TOKENS} are allowed", name)
    return ids


def _stop_strings(value: Any) -> list[str] | None:
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    name = "stop_strings"
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise RequestError(f"{name}={value!r} must be a string or a list of strings", name)
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"{name} has {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed", name)
    for string in strings:
        if not 0 < len(string) <= MAX_STOP_STRING_LENGTH:
            raise RequestError(
                f"{name}: a string of {len(string)} characters; 1 to {MAX_STOP_STRING_LENGTH} are allowed", name
            )
    return list(strings) or None


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    name = "logit_bias"
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}={value!r} must map token ids to numbers", name)
    if len(value) > MAX_LISTED_TOKENS:
        raise RequestError(f"{name} lists {len(value)} tokens; at most {MAX_LISTED_TOKENS} are allowed", name)
    bias = {}
    for key, amount in value.items():
        if isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdecimal():
            key = int(key)  # JSON has no integer keys
        token_id = _integer(f"{name} key", key, 0, 2**31 - 1, param=name)
        bias[token_id] = _real(f"{name}[{key}]", amount, -100, 100, param=name)
    return bias or None


def _structured_output(value: Any) -> dict[str, Any] | None:
    """The shape of it; whether the schema or the grammar itself is right shows when it is used."""
    if value is None:
        return None
    name = "structured_output"
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be a dict, not {type(value).__name__}", name)
    kinds = [key for key in value if key not in ("after", "opening")]
    if len(kinds) != 1 or kinds[0] not in STRUCTURES:
        raise RequestError(f"{name} must have exactly one of the keys {', '.join(STRUCTURES)}", name)
    kind, given = kinds[0], value[kinds[0]]
    if kind in ("regex", "grammar") and not (isinstance(given, str) and given):
        raise RequestError(f"{name}.{kind} must be a text that is not empty", name)
    if kind == "json_object" and given is not True:
        raise RequestError(f"{name}.json_object must be true", name)
    if kind == "json" and not isinstance(given, dict | str | bool):
        raise RequestError(f"{name}.json must be a JSON schema", name)
    if kind == "choice":
        if not (isinstance(given, list | tuple) and given and all(isinstance(text, str) and text for text in given)):
            raise RequestError(f"{name}.choice must be a list of texts, none of them empty", name)
        if len(given) > MAX_CHOICES:
            raise RequestError(f"{name}.choice has {len(given)} texts; at most {MAX_CHOICES} are allowed", name)
    for key in ("after", "opening"):
        text = value.get(key)
        if text is not None and not (isinstance(text, str) and 0 < len(text) <= 64):
            raise RequestError(f"{name}.{key} must be a text of 1 to 64 characters", name)
    if "opening" in value and "after" not in value:
        raise RequestError(f"{name}.opening needs {name}.after beside it", name)
    return value
