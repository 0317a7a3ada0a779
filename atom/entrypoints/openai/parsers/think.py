"""Reasoning between an opening and a closing marker, at the start of an answer.

Where an answer starts is decided by the end of the prompt: templates may open the reasoning, or close it
at once where none is wanted. Newlines right after a marker belong to it.
"""

from contextlib import suppress
from typing import Any, ClassVar

from atom.entrypoints.openai.parsers.source import Source, Steps

_LONGEST_BLANK = 32  # characters of whitespace before an opening marker


class _Thinking:
    """A ReasoningParser. `usual`: an answer without an opening marker begins as reasoning all the same."""

    opening: ClassVar[str] = "<think>"
    closing: ClassVar[str] = "</think>"
    markers: ClassVar[tuple[str, ...]] = ("<think>", "</think>")
    usual: ClassVar[bool] = False

    def __init__(self, request: Any, prompt_text: str) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._source = Source()
        self.thinks = self._starts_thinking(request, prompt_text)
        self._steps = self._parse(self.thinks)
        next(self._steps)

    def push(self, text: str) -> tuple[str, str]:
        if text:
            self._steps.send(text)
        return self._news()

    def flush(self) -> tuple[str, str]:
        with suppress(StopIteration):
            self._steps.send(None)
        return self._news()

    def _news(self) -> tuple[str, str]:
        news = "".join(self._reasoning), "".join(self._content)
        self._reasoning.clear()
        self._content.clear()
        return news

    def _starts_thinking(self, request: Any, prompt_text: str) -> bool | None:
        """None: it depends on whether the answer opens with a marker."""
        if request.continue_final_message:
            return self._is_open(request.messages[-1]) or None
        end = prompt_text.rstrip()
        if end.endswith(self.opening):
            return True
        if end.endswith(self.closing):
            return False
        return None

    def _is_open(self, message: Any) -> bool:
        """Whether the message to be continued stops within its reasoning."""
        content = message.content
        if not isinstance(content, str):
            content = "".join(str(part.get("text") or "") for part in content or ())
        return content.rfind(self.opening) > content.rfind(self.closing)

    def _parse(self, thinks: bool | None) -> Steps[None]:
        source = self._source
        if thinks is None:
            thinks = yield from self._opens()
        elif thinks:
            yield from self._newlines()
        if thinks:
            if (yield from source.pass_until((self.closing,), self._reasoning.append)):
                source.take(len(self.closing))
            yield from self._newlines()
        while (yield from source.peek()):
            self._content.append(source.take(len(source.text) - source.at))

    def _opens(self) -> Steps[bool]:
        source = self._source
        source.record()
        blank = 0
        while blank <= _LONGEST_BLANK and (yield from source.peek()).isspace():
            source.take(1)
            blank += 1
        if blank <= _LONGEST_BLANK and (yield from source.accept(self.opening)):
            source.end_record()
            yield from self._newlines()
            return True
        (self._reasoning if self.usual else self._content).append(source.end_record())
        return self.usual

    def _newlines(self) -> Steps[None]:
        while (yield from self._source.peek()) in ("\n", "\r"):
            self._source.take(1)


class OptionalThinking(_Thinking):
    """<think>...</think>, if the template or the model opens it."""


class UsualThinking(_Thinking):
    """The opening marker is often missing: text is reasoning until </think>, unless the prompt closed it."""

    usual = True

    def _starts_thinking(self, request: Any, prompt_text: str) -> bool | None:
        thinks = super()._starts_thinking(request, prompt_text)
        # Where an answer goes on after its reasoning, a missing marker means nothing.
        return bool(thinks) if request.continue_final_message else thinks


class MistralThinking(_Thinking):
    """[THINK]...[/THINK]."""

    opening, closing = "[THINK]", "[/THINK]"
    markers = ("[THINK]", "[/THINK]")
