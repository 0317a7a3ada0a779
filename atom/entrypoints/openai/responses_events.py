"""Output items of a response, and the events that tell how they grow."""

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from atom.entrypoints.openai.blocks import Block, Blocks, Change
from atom.entrypoints.openai.deltas import ChatAnswer, ChatDelta
from atom.entrypoints.openai.streaming import named_event

_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


def new_item_id(block: Block) -> str:
    return f"{_PREFIXES[block.kind]}_{uuid.uuid4().hex}"


def item_of(block: Block, item_id: str, status: str) -> dict[str, Any]:
    """The output item that a block is."""
    if block.kind == "call":
        return {
            "type": "function_call",
            "id": item_id,
            "call_id": block.call_id,
            "name": block.name,
            "arguments": block.text,
            "status": status,
        }
    content = [] if status == "in_progress" else [_part(block, block.text)]
    if block.kind == "reasoning":
        return {"type": "reasoning", "id": item_id, "summary": [], "content": content, "status": status}
    return {"type": "message", "id": item_id, "role": "assistant", "content": content, "status": status}


def output_of(answer: ChatAnswer) -> list[dict[str, Any]]:
    """The items of a whole answer; the last one is incomplete if the answer was cut."""
    blocks = Blocks.of(answer) or [Block("text", 0)]
    items = [item_of(block, new_item_id(block), "completed") for block in blocks]
    items[-1]["status"] = status_of(answer.finish_reason)
    return items


def status_of(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


class ResponseEvents:
    """Numbers and encodes the events of one response; `output` has the items that are done."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self.reasoning = ""
        self.finish_reason: str | None = None
        self._number = 0
        self._blocks = Blocks()
        self._item_id = ""

    def response(self, kind: str, body: dict[str, Any]) -> bytes:
        """response.created and its like."""
        return self._event(f"response.{kind}", {"response": body})

    def delta(self, delta: ChatDelta) -> bytes:
        """b"" where nothing is to be told."""
        self.reasoning += delta.reasoning_content
        data = self._events(self._blocks.take(delta), "completed")
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            if not self._blocks.all:  # clients expect a message
                data += self._events(self._blocks.start(Block("text", 0)), "completed")
            data += self._events(self._blocks.close(), status_of(delta.finish_reason))
        return data

    def _events(self, changes: Iterable[Change], status: str) -> bytes:
        return b"".join(event for change in changes for event in self._told(change, status))

    def _told(self, change: Change, status: str) -> Iterator[bytes]:
        block = change.block
        if change.kind == "start":
            self._item_id = new_item_id(block)
            item = item_of(block, self._item_id, "in_progress")
            yield self._event("response.output_item.added", {"output_index": block.index, "item": item})
        place: dict[str, Any] = {"item_id": self._item_id, "output_index": block.index}
        if block.kind == "call":
            name = "response.function_call_arguments"
        else:
            place["content_index"] = 0
            name = "response.reasoning_text" if block.kind == "reasoning" else "response.output_text"
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        if change.kind == "start":
            if block.kind != "call":
                yield self._event("response.content_part.added", place | {"part": _part(block, "")})
        elif change.kind == "grow":
            yield self._event(f"{name}.delta", place | {"delta": change.text} | logprobs)
        else:
            text = block.text
            whole = {"arguments": text, "name": block.name} if block.kind == "call" else {"text": text}
            yield self._event(f"{name}.done", place | whole | logprobs)
            if block.kind != "call":
                yield self._event("response.content_part.done", place | {"part": _part(block, text)})
            item = item_of(block, self._item_id, status)
            self.output.append(item)
            yield self._event("response.output_item.done", {"output_index": block.index, "item": item})

    def _event(self, kind: str, data: dict[str, Any]) -> bytes:
        body = {"type": kind, "sequence_number": self._number} | data
        self._number += 1
        return named_event(kind, body)


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
