"""JSON inside of a Source: where a value ends, without decoding it."""

import json
import re

from atom.entrypoints.openai.parsers.source import BrokenFormat, Sink, Source, Steps

_IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_BETWEEN = re.compile(r"[\s\w,:.+-]*", re.ASCII)  # anything but strings and brackets
_SCALAR = re.compile(r"[\w.+-]*", re.ASCII)
_CLOSING = {"{": "}", "[": "]"}


def pass_value(source: Source, sink: Sink) -> Steps[bool]:
    """Read one JSON value, passing its text on as it comes. False if the text ends or can't go on as JSON.

    Checked are strings and brackets, for they tell the end; the character that can't be JSON stays unread.
    """
    first = yield from source.peek()
    if first == '"':
        sink(source.take(1))
        return (yield from _pass_string(source, sink))
    if first in _CLOSING:
        return (yield from _pass_container(source, sink))
    passed = False
    while (yield from source.peek()) and (count := _length(_SCALAR, source)):
        sink(source.take(count))
        passed = True
    return passed


def read_string(source: Source) -> Steps[str]:
    """The next JSON string, decoded. BrokenFormat if there is none."""
    parts: list[str] = []
    if (yield from source.peek()) != '"' or not (yield from pass_value(source, parts.append)):
        raise BrokenFormat
    try:
        text: str = json.loads("".join(parts))
        text.encode()  # no lone surrogates
    except ValueError:
        raise BrokenFormat from None
    return text


def unwrapped(value: str) -> str:
    """The object in a JSON string that holds an object as JSON text; any other JSON text as it is."""
    try:
        text = json.loads(value)
        if isinstance(text, str) and isinstance(json.loads(text), dict):
            text.encode()
            return text
    except (ValueError, RecursionError):
        pass
    return value


def _pass_container(source: Source, sink: Sink) -> Steps[bool]:
    closing = []
    while char := (yield from source.peek()):
        if char in _CLOSING:
            closing.append(_CLOSING[char])
            sink(source.take(1))
        elif char == '"':
            sink(source.take(1))
            if not (yield from _pass_string(source, sink)):
                return False
        elif char == closing[-1]:
            closing.pop()
            sink(source.take(1))
            if not closing:
                return True
        elif count := _length(_BETWEEN, source):
            sink(source.take(count))
        else:
            return False
    return False


def _pass_string(source: Source, sink: Sink) -> Steps[bool]:
    """The rest of a string, after its opening quote."""
    while (yield from source.peek()):
        if count := _length(_IN_STRING, source):
            sink(source.take(count))
        elif source.text[source.at] == '"':
            sink(source.take(1))
            return True
        elif not (yield from source.more()):  # a backslash waits for what it escapes
            sink(source.take(1))
            return False
    return False


def _length(pattern: re.Pattern[str], source: Source) -> int:
    match = pattern.match(source.text, source.at)
    assert match is not None
    return match.end() - source.at
