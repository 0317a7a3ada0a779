"""What chats are made of, whatever the protocol: structured deltas, and the parsers that find the structure.

`atom.entrypoints.openai.parsers` offers get_reasoning_parser(name, tokenizer) and get_tool_parser(name,
tokenizer). Each raises ConfigError for an unknown name and returns a factory, which is called as
factory(request, prompt_text) for each of a request's n answers.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from atom.model_engine.outputs import PositionLogprobs


@dataclass(slots=True)
class ToolCallDelta:
    """A piece of a call. id and name come with its first piece, arguments (JSON text) in any number of pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class ChatDelta:
    """What became known of one of the n answers. finish_reason: OpenAI's, with the last delta of the answer."""

    index: int
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None


@dataclass(slots=True)
class ChatAnswer(ChatDelta):
    """One of the n answers, whole: the sum of its deltas."""

    def add(self, delta: ChatDelta) -> None:
        self.content += delta.content
        self.reasoning_content += delta.reasoning_content
        for piece in delta.tool_calls:
            call = next((c for c in self.tool_calls if c.index == piece.index), None)
            if call is None:
                self.tool_calls.append(ToolCallDelta(piece.index, piece.id, piece.name, piece.arguments))
            else:
                call.arguments += piece.arguments
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class ReasoningParser(Protocol):
    """The state of one answer. What is pushed and flushed, joined, loses nothing but the markers.

    thinks: whether the answer begins with reasoning; None = if it begins with the opening marker.
    """

    opening: ClassVar[str]
    closing: ClassVar[str]
    thinks: bool | None

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that became certain with this text."""

    def flush(self) -> tuple[str, str]:
        """The rest, when no more text comes."""


class ToolParser(Protocol):
    """The state of one answer; it gets the content that a reasoning parser leaves."""

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """(content, pieces of calls) that became certain with this text. Ids may be None: they are then made."""

    def flush(self) -> tuple[str, list[ToolCallDelta]]:
        """The rest, when no more text comes."""
