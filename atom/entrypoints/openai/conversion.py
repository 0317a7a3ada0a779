"""What Responses and Messages share on their way to a chat: texts, turns, and errors in the client's own names."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from atom.entrypoints.openai.context import ServingContext
from atom.entrypoints.openai.protocol import (
    ChatMessage,
    FunctionCall,
    FunctionDefinition,
    JsonSchemaFormat,
    ResponseFormat,
    ToolCall,
)
from atom.utils.errors import RequestError

_SHOWN = 100  # characters of a client's value that an error quotes


@contextlib.contextmanager
def errors_named(names: Mapping[str, str]) -> Iterator[None]:
    """RequestErrors about a chat's field become about the field it was made of."""
    try:
        yield
    except RequestError as error:
        old = error.param or ""
        if old not in names:
            raise
        raise RequestError(str(error).replace(old, names[old], 1), names[old]) from None


def text_of(content: Any, where: str, kinds: Mapping[str, str]) -> str:
    """Of a string, or of a list of parts; kinds: each type of part that is text -> the key of its text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts", _field(where))
    texts = []
    for index, part in enumerate(content):
        at = f"{where}[{index}]"
        kind = kind_of(part, at)
        if kind not in kinds:
            raise RequestError(f"{at}: type {kind!r} is not supported here; the model reads text", _field(where))
        texts.append(string_of(part, kinds[kind], at))
    return "\n".join(texts)


def kind_of(part: Any, where: str, default: str = "") -> str:
    """The type of an item, a block or a part, short enough to be quoted. RequestError unless it is an object."""
    if not isinstance(part, dict):
        raise RequestError(f"{where} must be an object", _field(where))
    kind = part.get("type") or default
    if not isinstance(kind, str):
        raise RequestError(f"{where}.type must be a string", _field(where))
    return kind[:_SHOWN]


def string_of(part: Mapping[str, Any], key: str, where: str) -> str:
    value = part.get(key)
    if not isinstance(value, str):
        problem = "is missing" if value is None else "must be a string"
        raise RequestError(f"{where}.{key} {problem}", _field(where))
    return value


def _field(where: str) -> str:
    return where.partition("[")[0].partition(".")[0]


class Turns:
    """A conversation that grows. What follows each other in one role becomes one message, as templates want it."""

    def __init__(self, messages: list[ChatMessage] | None = None) -> None:
        self.messages = messages or []
        self._reasoning: list[str] = []  # before the assistant's next message
        self._names: dict[str, str] = {}  # of functions, by the ids of calls
        for message in self.messages:
            for call in message.tool_calls or ():
                self._names[call.id or ""] = call.function.name

    def say(self, role: Any, text: str) -> None:
        last = self.messages[-1] if self.messages else None
        if role == "assistant":
            self._assistant(text)
            return
        self._reasoning.clear()
        if last is not None and last.role == role:
            last.content = f"{last.content}\n{text}"
        else:
            self.messages.append(ChatMessage(role=role, content=text))

    def think(self, text: str) -> None:
        self._reasoning.append(text)

    def call(self, call_id: str, name: str, arguments: str) -> None:
        self._names[call_id] = name
        message = self._assistant("")
        call = ToolCall(id=call_id, function=FunctionCall(name=name, arguments=arguments))
        message.tool_calls = [*(message.tool_calls or ()), call]

    def result(self, call_id: str, text: str) -> None:
        # Some templates show a function's name beside its result.
        name = self._names.get(call_id)
        self.messages.append(ChatMessage(role="tool", content=text, tool_call_id=call_id, name=name))

    def _assistant(self, text: str) -> ChatMessage:
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != "assistant":
            last = ChatMessage(role="assistant", content=text)
            self.messages.append(last)
        elif text:
            last.content = f"{last.content}\n{text}" if last.content else text
        if self._reasoning:
            last.reasoning_content = "\n".join(filter(None, [last.reasoning_content, *self._reasoning]))
            self._reasoning.clear()
        return last


def function_of(tool: dict[str, Any], where: str, schema_key: str) -> FunctionDefinition:
    """The function that a tool is; schema_key: where its parameters' schema is."""
    name = string_of(tool, "name", where)
    if not 0 < len(name) <= 256:
        raise RequestError(f"{where}.name must have 1 to 256 characters", "tools")
    schema = tool.get(schema_key)
    if schema is not None and not isinstance(schema, dict):
        raise RequestError(f"{where}.{schema_key} must be a JSON schema", "tools")
    description = None if tool.get("description") is None else string_of(tool, "description", where)
    strict = tool.get("strict")
    return FunctionDefinition(
        name=name, description=description, parameters=schema, strict=strict if isinstance(strict, bool) else None
    )


def json_schema_format(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=schema))


async def reasoning_tokens(context: ServingContext, reasoning: str, limit: int) -> int:
    """How many tokens of an answer of `limit` were reasoning: its text is counted anew, markers left out."""
    if not reasoning:
        return 0
    try:
        return min(limit, len(await context.engine.encode(reasoning, False)))
    except RequestError:  # another tokenization of it is too long
        return limit
