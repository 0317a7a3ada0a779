"""An answer as blocks that follow each other: reasoning, text, calls. Responses and Messages are told this way."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from atom.entrypoints.openai.deltas import ChatAnswer, ChatDelta, ToolCallDelta


@dataclass(slots=True)
class Block:
    """text: all of it so far; of a call, its arguments (JSON text)."""

    kind: Literal["reasoning", "text", "call"]
    index: int
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(slots=True)
class Change:
    """What happened to a block; text: what `grow` added."""

    kind: Literal["start", "grow", "stop"]
    block: Block
    text: str = ""


class Blocks:
    """Orders the deltas of one answer into blocks; one is open at a time. with_reasoning=False drops reasoning."""

    def __init__(self, with_reasoning: bool = True) -> None:
        self.all: list[Block] = []
        self._with_reasoning = with_reasoning
        self._open: Block | None = None
        self._call_index = -1  # of the newest call

    @classmethod
    def of(cls, answer: ChatAnswer, with_reasoning: bool = True) -> list[Block]:
        """A whole answer's."""
        blocks = cls(with_reasoning)
        delta = ChatDelta(0, answer.content, answer.reasoning_content, answer.tool_calls)
        for _ in blocks.take(delta):
            pass
        return blocks.all

    def take(self, delta: ChatDelta) -> Iterator[Change]:
        """The changes that a delta makes, in order."""
        if delta.reasoning_content and self._with_reasoning:
            yield from self._grow("reasoning", delta.reasoning_content)
        pieces = delta.tool_calls
        if self._open is not None and self._open.kind == "call":
            # The end of a call, before text that follows it.
            while pieces and pieces[0].index == self._call_index:
                yield from self._call(pieces[0])
                pieces = pieces[1:]
        if delta.content:
            yield from self._grow("text", delta.content)
        for piece in pieces:
            yield from self._call(piece)

    def close(self) -> Iterator[Change]:
        """The end of the block that is still open."""
        if self._open is not None:
            block, self._open = self._open, None
            yield Change("stop", block)

    def start(self, block: Block) -> Iterator[Change]:
        yield from self.close()
        self.all.append(block)
        self._open = block
        yield Change("start", block)

    def _grow(self, kind: Literal["reasoning", "text"], text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self.start(Block(kind, len(self.all)))
        yield from self._add(text)

    def _call(self, piece: ToolCallDelta) -> Iterator[Change]:
        if piece.index != self._call_index:
            self._call_index = piece.index
            yield from self.start(Block("call", len(self.all), piece.id or "", piece.name or ""))
        assert self._open is self.all[-1], "a block is open"
        assert self._open.kind == "call", "the pieces of a call follow each other"
        if piece.arguments:
            yield from self._add(piece.arguments)

    def _add(self, text: str) -> Iterator[Change]:
        assert self._open is not None
        self._open.pieces.append(text)
        yield Change("grow", self._open, text)
