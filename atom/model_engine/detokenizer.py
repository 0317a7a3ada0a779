"""Token ids to text, one token at a time.

What is pushed, joined, equals `tokenizer.decode(all ids, clean_up_tokenization_spaces=False)` with special
tokens skipped or not, as asked for, and no piece ends inside a character. Byte-level and SentencePiece
vocabularies (nearly all there are) are decoded from a table, in constant time a token; any other
decoder goes through the tokenizer with a window of context.

Stop strings are matched on the text, character by character, so the result doesn't depend on where
the token borders lie.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

_REPLACEMENT = "\ufffd"

# The decoder chain of Llama 2, Mistral and Gemma; the first two also strip the space that starts a text.
_SENTENCEPIECE: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class Decoder(ABC):
    """The decoding state of one sequence."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that became certain with this token; possibly empty."""

    @abstractmethod
    def flush(self) -> str:
        """The rest, when no more tokens come; the decoder is not used afterwards."""


class DetokenizerFactory:
    """Knows a tokenizer; makes decoders and names single tokens. `tokenizer` None gives empty text."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}
        self._make: Callable[[], Decoder]
        self._make_whole: Callable[[], Decoder]
        self._spaced: _SentencePieceTable | None = None  # whose decoder drops the space that starts a text
        self._make = self._make_whole = _NullDecoder
        if tokenizer is not None:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None or backend.decoder is None:
                skipped = frozenset(tokenizer.all_special_ids)
            else:
                skipped = _special_ids(backend)
            self._make = self._decoder_of(tokenizer, skipped)
            self._make_whole = self._decoder_of(tokenizer, frozenset())

    def _decoder_of(self, tokenizer: Any, skipped: frozenset[int]) -> Callable[[], Decoder]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.decoder is not None:
            form = json.loads(backend.decoder.__getstate__())
            if form["type"] == "ByteLevel":
                return partial(_ByteLevelDecoder, _ByteLevelTable(backend, skipped))
            if form["type"] == "Sequence" and form["decoders"] in (_SENTENCEPIECE, [*_SENTENCEPIECE, _STRIP]):
                strips = form["decoders"][-1] == _STRIP
                table = _SentencePieceTable(backend, skipped)
                if strips:
                    self._spaced = table
                return partial(_SentencePieceDecoder, table, strips)
        return partial(_WindowDecoder, tokenizer, skipped)

    def decoder(self, skip_special_tokens: bool = True) -> Decoder:
        """For a new sequence."""
        return self._make() if skip_special_tokens else self._make_whole()

    def token_text(self, token_id: int) -> str:
        """One token by itself, special tokens by name; invalid UTF-8 shows as U+FFFD."""
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = self._decode_one(token_id)
        return name

    def _decode_one(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        if self._spaced is not None and isinstance(piece := self._spaced[token_id], str) and piece:
            return piece
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class _NullDecoder(Decoder):
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _ByteLevelTable(dict[int, bytes]):
    """Token id -> its bytes; b"" for skipped and unknown ids. Filled as ids are met."""

    def __init__(self, backend: Any, skipped: frozenset[int]) -> None:
        super().__init__()
        self._backend = backend
        self._skipped = skipped
        self._bytes_of = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        if token is None:
            data = b""
        else:
            try:
                data = bytes([self._bytes_of[char] for char in token])
            except KeyError:  # an added token, written as it is
                data = token.encode()
        self[token_id] = data
        return data


class _ByteLevelDecoder(Decoder):
    """Tokens are bytes; what is held back is an incomplete character."""

    __slots__ = ("_pending", "_table")

    def __init__(self, table: _ByteLevelTable) -> None:
        self._table = table
        self._pending = b""

    def push(self, token_id: int) -> str:
        data = self._pending + self._table[token_id]
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        return self._pending.decode(errors="replace")


class _SentencePieceTable(dict[int, "str | int"]):
    """Token id -> its text, or the value of a single byte (<0x0A>); "" for skipped and unknown ids."""

    def __init__(self, backend: Any, skipped: frozenset[int]) -> None:
        super().__init__()
        self._backend = backend
        self._skipped = skipped

    def __missing__(self, token_id: int) -> "str | int":
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        piece: str | int
        if token is None:
            piece = ""
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">") and _is_hex(token[3:5]):
            piece = int(token[3:5], 16)
        else:
            piece = token.replace("\u2581", " ")
        self[token_id] = piece
        return piece


class _SentencePieceDecoder(Decoder):
    """Tokens are words; a run of byte tokens is decoded as a whole, so it is held back until it ends."""

    __slots__ = ("_run", "_strips", "_table")

    def __init__(self, table: _SentencePieceTable, strips: bool) -> None:
        self._table = table
        self._run = bytearray()
        self._strips = strips  # one space, if the text starts with it

    def push(self, token_id: int) -> str:
        piece = self._table[token_id]
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        if not piece:
            return ""  # skipped: does not end a run either
        return self._strip(self._end_run() + piece if self._run else piece)

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        if not self._strips or not text:
            return text
        self._strips = False
        return text[1:] if text[0] == " " else text


class _WindowDecoder(Decoder):
    """Any tokenizer: decode a few tokens of context without and with the new ones; the difference is new.

    Exact where a token's text depends on at most the window before it, which holds for the decoders
    in use (WordPiece, Metaspace, BPE suffixes).
    """

    __slots__ = ("_ids", "_skipped", "_tokenizer", "_used")

    _CONTEXT = 6  # tokens kept before the new ones
    _LONGEST_CHARACTER = 4  # bytes of UTF-8: after that many tokens a U+FFFD at the end is real

    def __init__(self, tokenizer: Any, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids: list[int] = []
        self._used = 0  # ids[:used] are emitted

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""  # would fill the window with nothing
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before, now = self._decode(self._ids[: self._used]), self._decode(self._ids)
        held = len(self._ids) - self._used < self._LONGEST_CHARACTER and now.endswith(_REPLACEMENT)
        if held and not final:
            return ""
        self._ids = self._ids[-self._CONTEXT :]
        self._used = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class StopMatcher:
    """Finds the first stop string to be completed and holds back what may still become one.

    One Knuth-Morris-Pratt automaton a string: constant work a character. Of two strings completed by
    the same character the longer one counts.
    """

    __slots__ = ("_automata", "_held", "_states")

    def __init__(self, stop_strings: Sequence[str]) -> None:
        # Longest first, so that it is the first to be found complete.
        self._automata = [(stop, _failure_table(stop)) for stop in sorted(stop_strings, key=len, reverse=True)]
        self._states = [0] * len(self._automata)
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, the stop string found if any); nothing is pushed after a find.

        armed False: strings that are completed now don't count.
        """
        states = self._states
        if not self._held and not any(states) and not any(stop[0] in text for stop, _ in self._automata):
            return text, None  # nearly every token of a normal answer
        for position, char in enumerate(text):
            for i, (stop, failure) in enumerate(self._automata):
                state = states[i]
                while state and (state == len(stop) or stop[state] != char):
                    state = failure[state]
                if stop[state] == char:
                    state += 1
                states[i] = state
                if armed and state == len(stop):
                    seen = self._held + text[: position + 1]
                    self._held = ""
                    return seen[: len(seen) - len(stop)], stop
        seen = self._held + text
        # A string completed while unarmed must not be held back for ever: only its proper border counts.
        hold = max(
            failure[state] if state == len(stop) else state
            for state, (stop, failure) in zip(states, self._automata, strict=True)
        )
        shown = len(seen) - hold
        self._held = seen[shown:]
        return seen[:shown], None

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """table[i]: length of the longest proper border of pattern[:i] (Knuth, Morris, Pratt 1977)."""
    table = [0] * (len(pattern) + 1)
    border = 0
    for i in range(1, len(pattern)):
        while border and pattern[i] != pattern[border]:
            border = table[border]
        if pattern[i] == pattern[border]:
            border += 1
        table[i + 1] = border
    return table


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte -> the byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _special_ids(backend: Any) -> frozenset[int]:
    return frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)


def _is_hex(text: str) -> bool:
    return all(c in "0123456789abcdefABCDEF" for c in text)
