"""Responses that can be asked for again and continued: the most recent ones, in memory."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from atom.entrypoints.openai.protocol import ChatMessage

MAX_RESPONSES = 1024
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """body: the response as it was sent. Its conversation is kept as JSON too, so that its size is known."""

    body: bytes
    conversation: bytes

    @property
    def size(self) -> int:
        return len(self.body) + len(self.conversation)

    def messages(self) -> list[ChatMessage]:
        """A copy of the conversation, with the response's own message at its end."""
        return [ChatMessage.model_validate(message) for message in msgspec.json.decode(self.conversation)]


class ResponseStore:
    """By id; the least recently used ones give way."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, body: dict[str, Any], messages: list[ChatMessage]) -> None:
        conversation = msgspec.json.encode([message.model_dump(exclude_none=True) for message in messages])
        self.remove(body["id"])
        entry = StoredResponse(msgspec.json.encode(body), conversation)
        self._entries[body["id"]] = entry
        self._bytes += entry.size
        while len(self._entries) > self._max_responses or self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.size

    def get(self, response_id: str) -> StoredResponse | None:
        entry = self._entries.get(response_id)
        if entry is not None:
            self._entries.move_to_end(response_id)
        return entry

    def remove(self, response_id: str) -> bool:
        """Whether it was there."""
        entry = self._entries.pop(response_id, None)
        if entry is not None:
            self._bytes -= entry.size
        return entry is not None
