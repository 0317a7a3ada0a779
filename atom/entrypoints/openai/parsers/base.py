"""What all tool parsers share: text that isn't a call, calls as they grow, and calls written as JSON objects."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from atom.entrypoints.openai.deltas import ToolCallDelta
from atom.entrypoints.openai.parsers.json_text import pass_value, read_string, unwrapped
from atom.entrypoints.openai.parsers.source import BrokenFormat, Source, Steps

_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")
_LONGEST_BLANK = 16  # characters of whitespace before a call that are held back, and dropped with its marker


class GrammarToolParser(ABC):
    """A ToolParser whose format is a generator, `_parse`, that reads from `_source`.

    A call is announced (its name sent) as soon as its arguments begin. What goes wrong before makes all
    of its text content; what goes wrong afterwards cuts its arguments, and the text from there on is
    content. Whitespace next to calls belongs to their markers.
    """

    markers: ClassVar[tuple[str, ...]] = ()  # all of the format
    closers: ClassVar[tuple[str, ...]] = ()  # of them, those that mean nothing alone, once there was a call

    def __init__(self, request: Any, prompt_text: str = "") -> None:
        self._request = request
        self._source = Source()
        self._content: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._arguments: list[str] = []  # of the newest call, not yet in _calls
        self._index = -1
        self._blank = ""  # whitespace at the end of the content, while a call may follow
        self._trims = False  # whitespace after a call
        self._steps = self._parse()
        next(self._steps)

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        if text:
            self._steps.send(text)
        return self._news()

    def flush(self) -> tuple[str, list[ToolCallDelta]]:
        try:
            self._steps.send(None)
        except StopIteration:
            pass
        else:
            raise AssertionError("the grammar reads on after the end")
        self._content.append(self._blank)
        return self._news()

    @abstractmethod
    def _parse(self) -> Steps[None]:
        """The grammar; ends when the source does."""

    # Content

    def _pass_content(self, *starts: str) -> Steps[str]:
        """Text is content up to a marker that starts calls: it is read, recorded and returned; "" at the end."""
        source = self._source
        if source.ended and self._index >= 0 and self._is_fragment(source.text[source.at :]):
            return ""
        while True:
            marker = yield from source.pass_until((*starts, *self.closers), self._say)
            source.record()
            source.take(len(marker))
            if not marker or marker in starts:
                return marker
            if self._index < 0:
                self._unread()
            else:
                source.end_record()

    def _say(self, text: str) -> None:
        if self._trims:
            text = text.lstrip()
            if not text:
                return
            self._trims = False
        text = self._blank + text
        end = max(len(text.rstrip()), len(text) - _LONGEST_BLANK)
        self._content.append(text[:end])
        self._blank = text[end:]

    def _unread(self) -> None:
        """What was recorded is no part of a call after all."""
        self._say(self._source.end_record())

    def _is_fragment(self, text: str) -> bool:
        """Whether it is no more than the start of a marker, which the end of the answer cut."""
        return any(marker.startswith(text) for marker in self.markers)

    # Calls

    def _announce(self, name: str, call_id: str | None = None) -> None:
        self._source.end_record()
        self._settle()
        self._blank = ""
        self._trims = True
        self._index += 1
        self._calls.append(ToolCallDelta(self._index, call_id, name))

    def _argue(self, text: str) -> None:
        """The next piece of the newest call's arguments."""
        if text:
            self._arguments.append(text)

    def _settle(self) -> None:
        if not self._arguments:
            return
        text = "".join(self._arguments)
        self._arguments.clear()
        if self._calls:
            self._calls[-1].arguments += text
        else:
            self._calls.append(ToolCallDelta(self._index, arguments=text))

    def _news(self) -> tuple[str, list[ToolCallDelta]]:
        self._settle()
        content = "".join(self._content)
        self._content.clear()
        calls, self._calls = self._calls, []
        return content, calls

    def _call_id(self) -> str | None:
        """For a call that has none; None leaves it to the server."""
        return None

    # Calls written as {"name": ..., "arguments": {...}}

    def _call_object(self, is_tool: Callable[[str], bool] = bool) -> Steps[None]:
        """One call; what follows it is recorded. BrokenFormat, also for a name that is_tool refuses."""
        source = self._source
        name: str | None = None
        arguments: list[str] | None = None  # held back, where they come before the name
        announced = False
        yield from source.expect("{")
        while True:
            yield from source.blank()
            key = yield from read_string(source)
            yield from source.blank()
            yield from source.expect(":")
            yield from source.blank()
            if key == "name" and name is None:
                name = yield from read_string(source)
                if not is_tool(name):
                    raise BrokenFormat
            elif key in _ARGUMENT_KEYS and not announced and arguments is None:
                if name is not None:
                    if not (yield from source.peek()):
                        raise BrokenFormat
                    self._announce(name, self._call_id())
                    announced = True
                    complete = yield from self._pass_arguments()
                    source.record()
                    if not complete:
                        raise BrokenFormat
                else:
                    arguments = []
                    if not (yield from pass_value(source, arguments.append)):
                        raise BrokenFormat
            elif key not in _OTHER_KEYS or not (yield from pass_value(source, _nothing)):
                raise BrokenFormat
            yield from source.blank()
            if (yield from source.accept("}")):
                break
            yield from source.expect(",")
        if not announced:
            if name is None:
                raise BrokenFormat
            self._announce(name, self._call_id())
            self._argue(_as_object("".join(arguments or ())))
        source.record()

    def _call_array(self) -> Steps[None]:
        """Calls in [...]; what follows is recorded. BrokenFormat."""
        source = self._source
        yield from source.expect("[")
        while True:
            yield from source.blank()
            yield from self._call_object()
            yield from source.blank()
            if (yield from source.accept("]")):
                source.record()
                return
            yield from source.expect(",")

    def _pass_arguments(self) -> Steps[bool]:
        """A JSON value, streamed if it is an object, as it should be. False if it is cut."""
        source = self._source
        if (yield from source.peek()) in ("{", "["):
            return (yield from pass_value(source, self._argue))
        parts: list[str] = []
        complete = yield from pass_value(source, parts.append)
        text = "".join(parts)
        self._argue(_as_object(text) if complete else text)
        return complete


def _as_object(value: str) -> str:
    """Arguments that aren't written as an object: none at all, or an object as text."""
    return "{}" if value in ("", "null") else unwrapped(value)


def _nothing(text: str) -> None:
    pass
