"""What formats with one element per argument share: the JSON object that their arguments become."""

import json

from atom.entrypoints.openai.parsers.base import GrammarToolParser
from atom.entrypoints.openai.parsers.source import Steps
from atom.entrypoints.openai.parsers.typed_arguments import STRING, as_json, parameter_types


class ElementToolParser(GrammarToolParser):
    """Strings are streamed; a value of another type is held back until it is whole, as its text decides."""

    def _begin_call(self, name: str) -> None:
        self._announce(name)
        self._tool = name
        self._num_arguments = 0

    def _pass_argument(self, key: str, *ends: str) -> Steps[bool]:
        """A value up to one of the ends, which is read. False if the text ends before."""
        source = self._source
        source.end_record()
        types = parameter_types(self._request, self._tool, key)
        self._argue(("{" if self._num_arguments == 0 else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._num_arguments += 1
        if types == STRING:
            self._argue('"')
            end = yield from source.pass_until(ends, self._argue_string, drop_fragment=True)
            if end:
                self._argue('"')
        else:
            parts: list[str] = []
            end = yield from source.pass_until(ends, parts.append, drop_fragment=True)
            text = "".join(parts)
            self._argue(as_json(text, types) if end else text)
        source.take(len(end))
        source.record()
        return bool(end)

    def _end_call(self) -> None:
        self._argue("}" if self._num_arguments else "{}")

    def _argue_string(self, text: str) -> None:
        self._argue(json.dumps(text, ensure_ascii=False)[1:-1])
