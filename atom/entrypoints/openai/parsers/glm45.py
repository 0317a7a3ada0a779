"""<tool_call>name, then <arg_key>key</arg_key><arg_value>value</arg_value> each, </tool_call>: GLM 4.5 and later."""

from atom.entrypoints.openai.parsers.elements import ElementToolParser
from atom.entrypoints.openai.parsers.source import BrokenFormat, Steps


class Glm45ToolParser(ElementToolParser):
    markers = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    closers = ("</tool_call>",)

    def _parse(self) -> Steps[None]:
        while (yield from self._pass_content("<tool_call>")):
            try:
                yield from self._call()
                self._source.end_record()
            except BrokenFormat:
                self._unread()

    def _call(self) -> Steps[None]:
        source = self._source
        yield from source.blank()
        name, _ = yield from source.until("<", "\n")
        yield from source.blank()
        if not name.strip() or not (
            (yield from source.follows("<arg_key>")) or (yield from source.follows("</tool_call>"))
        ):
            raise BrokenFormat
        self._begin_call(name.strip())
        source.record()
        while (yield from source.accept("<arg_key>")):
            key, _ = yield from source.until("</arg_key>")
            source.take(len("</arg_key>"))
            yield from source.blank()
            if not (yield from source.accept("<arg_value>")):
                break
            if not (yield from self._pass_argument(key.strip(), "</arg_value>")):
                return
            yield from source.blank()
        if source.ended:
            raise BrokenFormat  # its arguments stay cut
        self._end_call()
        yield from source.expect("</tool_call>")
