"""Answers of a given form: JSON of a schema, a regular expression, a choice of texts, or a grammar.

`grammar_of` checks what a request asks for and writes it as one grammar, in the front end. `GrammarCompiler`
makes of it, beside the engine core, a `Grammar`: the automaton that tells which tokens may come next. The
automata are llguidance's (https://github.com/guidance-ai/llguidance): lazy, so that there is nothing to
compile ahead, and with limits on the work of each step, so that no grammar can hold up a batch.
"""

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from atom.model_engine.protocol import EngineOutput
from atom.sampling_params import STRUCTURES
from atom.utils.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_LENGTH = 256 * 1024  # characters
MAX_SCHEMA_DEPTH = 128
# Enough to lay JSON out; a small model left free to add white space may do nothing else.
_WHITE_SPACE = r"[ \t\n]{0,16}"
_CACHED_GRAMMARS = 256


def grammar_of(structure: dict[str, Any]) -> str:
    """The grammar of `SamplingParams.structured_output`, in llguidance's own form. RequestError for a wrong one."""
    kind = next(key for key in structure if key in STRUCTURES)
    value = structure[kind]
    if kind == "json_object":
        kind, value = "json", {"type": "object"}
    if kind == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _error("structured_output.json is not valid JSON") from None
        if not isinstance(value, dict | bool):
            raise _error("structured_output.json must be a JSON schema: an object or a boolean")
    if kind == "json":
        _check_depth(value)
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError) as error:
        raise _error(f"structured_output.{kind} can't be written as JSON: {error}") from None
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise _error(f"structured_output.{kind} has {len(text)} characters; {MAX_GRAMMAR_LENGTH} are allowed")
    return _checked_grammar(kind, text, structure.get("after"), structure.get("opening"))


@functools.lru_cache(_CACHED_GRAMMARS)
def _checked_grammar(kind: str, text: str, after: str | None, opening: str | None) -> str:
    from llguidance import LLMatcher

    try:
        text.encode()
        grammar = _write_grammar(kind, text, after, opening)
    except UnicodeEncodeError:
        raise _error(f"structured_output.{kind} is not valid Unicode: it contains unpaired surrogates") from None
    except (ValueError, RecursionError) as error:
        raise _error(f"structured_output.{kind} is not valid: {_first_line(str(error))}") from None
    problem = LLMatcher.validate_grammar(grammar, limits=_limits())
    if problem:
        raise _error(f"structured_output.{kind} is not valid: {_first_line(problem)}")
    return grammar


def _write_grammar(kind: str, text: str, after: str | None, opening: str | None) -> str:
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if kind == "json":
        schema = json.loads(text)
        if after is None:
            return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITE_SPACE})
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        rule = "%json " + json.dumps(schema | {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}})
    elif kind == "choice":
        rule = " | ".join(json.dumps(choice) for choice in json.loads(text))
    elif kind == "regex":
        if after is None:
            return LLMatcher.grammar_from_regex(text)
        rule = f"/{regex_to_lark(text)}/"
    else:
        if after is None:
            return grammar_from("grammar", text)
        raise ValueError("a grammar can't follow reasoning; let it describe the whole answer")
    if after is None:
        return LLMatcher.grammar_from_lark(f"start: {rule}")
    start = "free answer" if opening is None else f"({json.dumps(opening)} free)? answer"
    return LLMatcher.grammar_from_lark(
        f"start: {start}\nfree[suffix={json.dumps(after)}]: /(?s:.*)/\nanswer: /[ \\t\\r\\n]{{0,4}}/ structure\n"
        f"structure: {rule}"
    )


def _limits() -> Any:
    """Of the work for one request; a step takes 0.1 ms as a rule, and some 15 ms before it is given up."""
    from llguidance import LLParserLimits

    return LLParserLimits(initial_lexer_fuel=300_000, max_lexer_states=50_000, verbose_errors=False)


def _check_depth(schema: Any) -> None:
    """Bounds the nesting before anything recursive sees it."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise _error(f"structured_output.json is nested more than {MAX_SCHEMA_DEPTH} levels deep")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def _error(message: str) -> RequestError:
    return RequestError(message, "structured_output")


class Grammar:
    """The state of one answer. It is made in the background: nothing but `is_ready` may be asked until that is true.

    error: why the structure can't be kept up; such a request has to end.
    """

    def __init__(self, made: "Future[LLMatcher]", end_token_ids: Sequence[int]) -> None:
        self._made = made
        self._end_token_ids = end_token_ids
        self.error: str | None = None

    @property
    def is_ready(self) -> bool:
        return self._made.done()

    def check(self) -> bool:
        """Whether it could be made and has not failed since; sets `error`."""
        failure = self._made.exception()
        if failure is not None:
            self.error = f"structured_output can't be used: {failure}"
        elif self._made.result().is_error():
            self.error = f"structured_output is too complex: {_first_line(self._made.result().get_error())}"
        return self.error is None

    def failure(self, request_id: str) -> EngineOutput:
        """What ends a request whose grammar has an `error`."""
        return EngineOutput(
            request_id=request_id,
            new_token_ids=[],
            finish_reason="error",
            error=self.error,
            error_param="structured_output",
        )

    def mask(self, ignore_ends: bool) -> bytes:
        """Bit i of the little-endian bytes tells whether token i may come next.

        ignore_ends: whether the end tokens may come only where nothing else can.
        """
        mask: bytes = self._made.result().compute_bitmask()
        return self._without_ends(mask) if ignore_ends else mask

    def takes_last(self, token_id: int) -> bool:
        """Go on by a token of the answer, which may be an end token; whether nothing can follow it."""
        matcher = self._made.result()
        if not matcher.consume_token(token_id):
            self.check()
        return matcher.is_stopped()

    def _without_ends(self, mask: bytes) -> bytes:
        without = bytearray(mask)
        for token_id in self._end_token_ids:
            without[token_id // 8] &= ~(1 << token_id % 8)
        return bytes(without) if any(without) else mask


class GrammarCompiler:
    """Makes the grammars of an engine core; its first use loads the tokenizer.

    load_tokenizer: a tokenizer of transformers. end_token_ids: those a complete answer may end with.
    """

    def __init__(self, load_tokenizer: Callable[[], Any], vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = list(end_token_ids)
        self._thread: ThreadPoolExecutor | None = None
        self._tokenizer: LLTokenizer | None = None

    def start(self, grammar: str) -> Grammar:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        return Grammar(self._thread.submit(self._make, grammar), self._end_token_ids)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        matcher = LLMatcher(self._tokenizer, grammar, limits=_limits(), log_level=0)
        matcher.compute_bitmask()  # the first takes longest, and this thread is in nobody's way
        return matcher

    def _make_tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        backend = getattr(self._load_tokenizer(), "backend_tokenizer", None)
        if backend is None:
            raise RuntimeError("the model's tokenizer is not of the `tokenizers` library")
        plain = Tokenizer.from_str(backend.to_str())  # a copy: the settings below are not for others
        plain.no_padding()
        plain.no_truncation()
        return LLTokenizer(plain.to_str(), n_vocab=self._vocab_size, eos_token=self._end_token_ids or None)
