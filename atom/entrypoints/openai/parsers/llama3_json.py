"""{"name": ..., "parameters": {...}}, several separated by ";": Llama 3.1 and later.

Calls stand at the start of the answer or after <|python_tag|>. Without that tag a JSON object may as well
be the answer, so it must name one of the request's tools.
"""

from collections.abc import Callable

from atom.entrypoints.openai.parsers.base import GrammarToolParser
from atom.entrypoints.openai.parsers.source import BrokenFormat, Steps


class Llama3JsonToolParser(GrammarToolParser):
    markers = ("<|python_tag|>",)

    def _parse(self) -> Steps[None]:
        source = self._source
        tools = {tool.function.name for tool in self._request.tools or ()}
        source.record()
        yield from self._calls_or_content(tools.__contains__)
        while (yield from self._pass_content("<|python_tag|>")):
            yield from self._calls_or_content(bool)

    def _calls_or_content(self, is_tool: Callable[[str], bool]) -> Steps[None]:
        source = self._source
        try:
            while True:
                yield from source.blank()
                yield from self._call_object(is_tool)
                yield from source.blank()
                yield from source.expect(";")
        except BrokenFormat:
            self._unread()
