"""DeepSeek V3, R1 (the type, then the name and fenced JSON) and V3.1 (the name, then bare JSON)."""

from atom.entrypoints.openai.parsers.base import GrammarToolParser
from atom.entrypoints.openai.parsers.json_text import pass_value
from atom.entrypoints.openai.parsers.source import BrokenFormat, Steps

_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"  # noqa: RUF001
_CALLS_END = "<｜tool▁calls▁end｜>"  # noqa: RUF001
_CALL_BEGIN = "<｜tool▁call▁begin｜>"  # noqa: RUF001
_CALL_END = "<｜tool▁call▁end｜>"  # noqa: RUF001
_SEPARATOR = "<｜tool▁sep｜>"  # noqa: RUF001
_FENCE = "```"


class DeepSeekV3ToolParser(GrammarToolParser):
    markers = (_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEPARATOR)
    closers = (_CALLS_END, _CALL_END)

    def _parse(self) -> Steps[None]:
        source = self._source
        while marker := (yield from self._pass_content(_CALLS_BEGIN, _CALL_BEGIN)):
            try:
                if marker == _CALLS_BEGIN:
                    yield from source.blank()
                    yield from source.expect(_CALL_BEGIN)
                yield from self._call()
                source.end_record()
            except BrokenFormat:
                self._unread()

    def _call(self) -> Steps[None]:
        source = self._source
        name, _ = yield from source.until(_SEPARATOR, _CALL_END, _CALL_BEGIN)
        yield from source.expect(_SEPARATOR)
        yield from source.blank()
        fenced = (yield from source.peek()) not in ("{", "<")
        if fenced:
            if name.strip() != "function":
                raise BrokenFormat
            name, _ = yield from source.until(_FENCE, _CALL_END, _CALL_BEGIN)
            yield from source.expect(_FENCE)
            yield from source.accept("json")
            yield from source.blank()
        name = name.strip()
        if not name:
            raise BrokenFormat
        if (yield from source.peek()) == "{":
            self._announce(name)
            complete = yield from pass_value(source, self._argue)
            source.record()
            if not complete:
                raise BrokenFormat
        elif (yield from source.follows(_CALL_END)):
            self._announce(name)
            self._argue("{}")
            source.record()
        else:
            raise BrokenFormat
        yield from source.blank()
        if fenced:
            yield from source.accept(_FENCE)
            yield from source.blank()
        yield from source.expect(_CALL_END)
