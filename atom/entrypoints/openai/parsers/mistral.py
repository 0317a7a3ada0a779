"""[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and [TOOL_CALLS]name[ARGS]{...} since tokenizer v11."""

import re
import uuid

from atom.entrypoints.openai.parsers.base import GrammarToolParser
from atom.entrypoints.openai.parsers.json_text import pass_value
from atom.entrypoints.openai.parsers.source import BrokenFormat, Steps

_NAME = re.compile(r"[\w.-]+")


class MistralToolParser(GrammarToolParser):
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def _parse(self) -> Steps[None]:
        source = self._source
        while (yield from self._pass_content("[TOOL_CALLS]")):
            try:
                yield from source.blank()
                first = yield from source.peek()
                if first == "[":
                    yield from self._call_array()
                elif first == "{":
                    yield from self._call_object()
                else:
                    yield from self._named_call()
                source.end_record()
            except BrokenFormat:
                self._unread()

    def _named_call(self) -> Steps[None]:
        source = self._source
        text, marker = yield from source.until("[ARGS]", "[CALL_ID]", "[TOOL_CALLS]", "{")
        name, call_id = text.strip(), None
        if not _NAME.fullmatch(name):
            raise BrokenFormat
        if marker == "[CALL_ID]":
            source.take(len(marker))
            call_id, _ = yield from source.until("[ARGS]", "[TOOL_CALLS]", "{")
        yield from source.accept("[ARGS]")
        yield from source.blank()
        if (yield from source.peek()) != "{":
            raise BrokenFormat
        self._announce(name, (call_id or "").strip() or self._call_id())
        yield from pass_value(source, self._argue)

    def _call_id(self) -> str:
        return uuid.uuid4().hex[:9]  # Mistral's templates refuse ids that aren't nine letters and digits
