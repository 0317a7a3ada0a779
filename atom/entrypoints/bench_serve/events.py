"""The JSON of OpenAI's streams: only what is measured is decoded."""

from typing import Any

import msgspec

from atom.entrypoints.bench_serve.records import Record

_DONE = b"[DONE]"


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode
_decode_any = msgspec.json.Decoder().decode


class AnswerReader:
    """Writes the events of one answer, as they come, to its record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.done = False  # [DONE] has come

    def read(self, data: bytes, now: float) -> None:
        """data: that of one event; now: when it came."""
        if data == _DONE:
            self.done = True
            return
        record = self.record
        try:
            event = _decode(data)
        except msgspec.MsgspecError:
            record.error = record.error or "an event is not the JSON of a completion"
            return
        if event.error is not None:
            record.error = record.error or "error in the stream: " + error_text(data)
        if event.usage is not None:
            record.prompt_tokens = event.usage.prompt_tokens
            record.completion_tokens = event.usage.completion_tokens
        for choice in event.choices:
            if _has_tokens(choice):
                record.event_times.append(now)
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason

    def end(self) -> None:
        """The stream has ended; an answer cut short is an error."""
        record = self.record
        if not self.done and record.finish_reason is None:
            record.error = record.error or "the stream ended before the answer did"
        elif not record.event_times:
            record.error = record.error or "the answer has no tokens"


def _has_tokens(choice: _Choice) -> bool:
    if choice.text is not None:
        # Without text (half a character, a special token) it is still a token, unless it only says why all ends.
        return bool(choice.text) or choice.finish_reason is None
    delta = choice.delta
    # A chat's first event, with the role and content "", carries no token.
    return delta is not None and bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


def error_text(body: bytes) -> str:
    """The message in an error's body, in one line of at most 200 characters."""
    try:
        value = _decode_any(body)
    except msgspec.MsgspecError:
        value = body.decode("utf-8", "replace")
    for name in ("error", "message", "detail"):  # OpenAI's shape, older vLLM's, FastAPI's
        if isinstance(value, dict) and name in value:
            value = value[name]
    return " ".join(str(value).split())[:200]
