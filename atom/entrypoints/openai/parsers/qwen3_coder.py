"""<tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen3-Coder and later."""

from atom.entrypoints.openai.parsers.elements import ElementToolParser
from atom.entrypoints.openai.parsers.source import BrokenFormat, Steps


class Qwen3CoderToolParser(ElementToolParser):
    markers = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")
    closers = ("</tool_call>",)

    def _parse(self) -> Steps[None]:
        source = self._source
        # The models sometimes leave <tool_call> out.
        while marker := (yield from self._pass_content("<tool_call>", "<function=")):
            try:
                if marker == "<tool_call>":
                    yield from source.blank()
                    yield from source.expect("<function=")
                yield from self._function()
                yield from source.blank()
                yield from source.accept("</tool_call>")
                source.end_record()
            except BrokenFormat:
                self._unread()

    def _function(self) -> Steps[None]:
        source = self._source
        name, _ = yield from source.until(">", "<", "\n")
        yield from source.expect(">")
        yield from source.blank()
        if not name.strip() or not (
            (yield from source.follows("<parameter=")) or (yield from source.follows("</function>"))
        ):
            raise BrokenFormat
        self._begin_call(name.strip())
        source.record()
        while (yield from source.accept("<parameter=")):
            key, end = yield from source.until(">", "<", "\n")
            if end != ">":
                break
            source.take(1)
            yield from source.accept("\n")  # these newlines are the format's, not the value's
            if not (yield from self._pass_argument(key.strip(), "\n</parameter>", "</parameter>")):
                return
            yield from source.blank()
        if source.ended:
            raise BrokenFormat  # its arguments stay cut
        self._end_call()
        yield from source.expect("</function>")
        source.record()
