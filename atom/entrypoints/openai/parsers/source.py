"""Text that arrives in pieces, read as if it were whole.

A grammar is written as a generator that reads from a `Source`, and waits inside of its read calls for
pieces to come. It therefore sees the same text however it is split. Each read keeps at most the start of
a marker unread, so the time is linear in the text.
"""

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, str | None, T]  # is sent the next piece, or None when there are no more
Sink = Callable[[str], object]

_BLANK = re.compile(r"[ \t\r\n]*")
_LONGEST_RECORD = 1 << 16  # characters that may be held back until it is clear what they are


class BrokenFormat(Exception):
    """The text doesn't continue as the format says. What was read since `record` is in the record."""


class Source:
    __slots__ = ("at", "ended", "record_room", "recorded", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # text[at:] is unread
        self.ended = False
        self.recorded: list[str] | None = None
        self.record_room = 0

    def more(self) -> Steps[bool]:
        """Wait for text beyond what is there; False if none comes."""
        if self.ended:
            return False
        piece = yield
        if piece is None:
            self.ended = True
            return False
        self.text = self.text[self.at :] + piece
        self.at = 0
        return True

    def record(self) -> None:
        """Keep what is read from here on, to give it back should it turn out not to be what it seemed."""
        self.recorded, self.record_room = [], _LONGEST_RECORD

    def end_record(self) -> str:
        recorded, self.recorded = self.recorded, None
        return "".join(recorded or ())

    def take(self, count: int) -> str:
        """Read characters that are there. BrokenFormat when the record gets too long."""
        recorded = self.recorded
        too_long = recorded is not None and count > self.record_room
        if too_long:
            count = self.record_room
        text = self.text[self.at : self.at + count]
        self.at += count
        if recorded is not None:
            recorded.append(text)
            self.record_room -= count
            if too_long:
                raise BrokenFormat
        return text

    def peek(self) -> Steps[str]:
        """The next character, unread; "" at the end."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def blank(self) -> Steps[None]:
        """Read JSON's whitespace, if any."""
        while (yield from self.peek()) and (match := _BLANK.match(self.text, self.at)):
            if match.end() == self.at:
                return
            self.take(match.end() - self.at)

    def follows(self, marker: str) -> Steps[bool]:
        """Whether the marker comes next; it stays unread."""
        while len(self.text) - self.at < len(marker) and marker.startswith(self.text[self.at :]):
            if not (yield from self.more()):
                return False
        return self.text.startswith(marker, self.at)

    def accept(self, marker: str) -> Steps[bool]:
        """Read the marker if it comes next."""
        found = yield from self.follows(marker)
        if found:
            self.take(len(marker))
        return found

    def expect(self, marker: str) -> Steps[None]:
        """Read the marker. BrokenFormat if something else comes."""
        if not (yield from self.accept(marker)):
            raise BrokenFormat

    def pass_until(self, markers: tuple[str, ...], sink: Sink, *, drop_fragment: bool = False) -> Steps[str]:
        """Read up to the first of the markers, which stays unread and is returned; "" at the end.

        Of markers that begin at the same place the first in the tuple counts, so a longer one goes first.
        drop_fragment: when the text ends within what looks like a marker, that isn't passed on.
        """
        pattern = _pattern(markers) if markers else None
        while True:
            match = pattern.search(self.text, self.at) if pattern else None
            if match is not None:
                if match.start() > self.at:
                    sink(self.take(match.start() - self.at))
                return match.group()
            count = len(self.text) - self.at - _begun(self.text, self.at, markers)
            if count:
                sink(self.take(count))
            if not (yield from self.more()):
                if self.at < len(self.text):
                    fragment = self.take(len(self.text) - self.at)
                    if not drop_fragment:
                        sink(fragment)
                return ""

    def until(self, *markers: str) -> Steps[tuple[str, str]]:
        """(text before the first of the markers, that marker, unread). BrokenFormat if there is none."""
        parts: list[str] = []
        marker = yield from self.pass_until(markers, parts.append)
        if not marker:
            raise BrokenFormat
        return "".join(parts), marker


@cache
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))


@cache
def _firsts(markers: tuple[str, ...]) -> tuple[frozenset[str], int]:
    return frozenset(marker[0] for marker in markers), max(map(len, markers), default=1)


def _begun(text: str, at: int, markers: tuple[str, ...]) -> int:
    """How many characters at the end of text[at:] may be the start of a marker."""
    firsts, longest = _firsts(markers)
    for start in range(max(at, len(text) - longest + 1), len(text)):
        if text[start] in firsts and any(marker.startswith(text[start:]) for marker in markers):
            return len(text) - start
    return 0
