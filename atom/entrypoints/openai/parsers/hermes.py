"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3."""

from atom.entrypoints.openai.parsers.base import GrammarToolParser
from atom.entrypoints.openai.parsers.source import BrokenFormat, Steps


class HermesToolParser(GrammarToolParser):
    markers = ("<tool_call>", "</tool_call>")
    closers = ("</tool_call>",)

    def _parse(self) -> Steps[None]:
        source = self._source
        while (yield from self._pass_content("<tool_call>")):
            try:
                yield from source.blank()
                yield from self._call_object()
                yield from source.blank()
                yield from source.expect("</tool_call>")
                source.end_record()
            except BrokenFormat:
                self._unread()
