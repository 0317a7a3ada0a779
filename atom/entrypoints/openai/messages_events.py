"""Content blocks of a message, and the events that tell how they grow."""

from collections.abc import Iterable
from typing import Any

import msgspec

from atom.entrypoints.openai.blocks import Block, Blocks, Change
from atom.entrypoints.openai.deltas import ChatAnswer, ChatDelta
from atom.entrypoints.openai.streaming import named_event


def sse(kind: str, data: dict[str, Any]) -> bytes:
    """One event of Anthropic's streams."""
    return named_event(kind, {"type": kind} | data)


def content_of(answer: ChatAnswer, with_thinking: bool) -> list[dict[str, Any]]:
    """The blocks of a whole answer."""
    return [_content_block(block) for block in Blocks.of(answer, with_thinking)]


def stop_of(part: ChatDelta | ChatAnswer) -> dict[str, Any]:
    """stop_reason and stop_sequence of an answer that has ended."""
    reason, sequence = "end_turn", None
    if part.finish_reason == "length":
        reason = "max_tokens"
    elif part.finish_reason == "tool_calls":
        reason = "tool_use"
    elif isinstance(part.stop_reason, str):
        reason, sequence = "stop_sequence", part.stop_reason
    return {"stop_reason": reason, "stop_sequence": sequence}


class MessageEvents:
    """The events of the content; `last` is the delta that ended the answer."""

    def __init__(self, with_thinking: bool) -> None:
        self.reasoning = ""
        self.last: ChatDelta | None = None
        self._blocks = Blocks(with_thinking)

    def delta(self, delta: ChatDelta) -> bytes:
        """b"" where nothing is to be told."""
        self.reasoning += delta.reasoning_content
        data = self._events(self._blocks.take(delta))
        if delta.finish_reason is not None:
            self.last = delta
            data += self._events(self._blocks.close())
        return data

    def _events(self, changes: Iterable[Change]) -> bytes:
        return b"".join(_event(change) for change in changes)


def _event(change: Change) -> bytes:
    block = change.block
    if change.kind == "start":
        return sse("content_block_start", {"index": block.index, "content_block": _content_block(block)})
    if change.kind == "stop":
        return sse("content_block_stop", {"index": block.index})
    if block.kind == "reasoning":
        delta = {"type": "thinking_delta", "thinking": change.text}
    elif block.kind == "text":
        delta = {"type": "text_delta", "text": change.text}
    else:
        delta = {"type": "input_json_delta", "partial_json": change.text}
    return sse("content_block_delta", {"index": block.index, "delta": delta})


def _content_block(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": block.text, "citations": None}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _arguments(block.text)}


def _arguments(text: str) -> dict[str, Any]:
    """Arguments that were cut can't be told as an object; stop_reason says that they were."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
