"""Calls that a request demands (tool_choice "required" or a named tool): what answers are held to, and how to read it.

"required" makes an array of {"name": ..., "parameters": {...}}, a named tool the bare object of its arguments.
"""

from typing import Any

from atom.entrypoints.openai.deltas import ToolParser
from atom.entrypoints.openai.parsers.base import GrammarToolParser
from atom.entrypoints.openai.parsers.json_text import pass_value
from atom.entrypoints.openai.parsers.source import BrokenFormat, Steps
from atom.entrypoints.openai.protocol import NamedToolChoice
from atom.utils.errors import RequestError

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # of schemas
_VALUES = ("const", "enum", "default", "example", "examples")  # keywords that hold data, not schemas


def schema_for(request: Any) -> dict[str, Any] | None:
    """The JSON schema of answers to a request that demands a call, else None.

    request: a ChatCompletionRequest, or anything with its tools, tool_choice and parallel_tool_calls; a tool
    that is named must be one of the tools. RequestError for schemas that are nested too deeply.
    """
    choice = request.tool_choice
    tools = [tool.function for tool in request.tools or ()]
    if isinstance(choice, NamedToolChoice):
        return _arguments_schema(next(tool for tool in tools if tool.name == choice.function.name))
    if choice != "required":
        return None
    calls: list[dict[str, Any]] = []
    definitions = {}
    for index, tool in enumerate(tools):
        # References inside of a tool's schema mean that schema, so it becomes a definition of its own.
        key = f"tool{index}"
        try:
            definitions[key] = _moved(_arguments_schema(tool), f"#/$defs/{key}")
        except RecursionError:
            raise RequestError(f"tools: the parameters of {tool.name!r:.100} are nested too deeply", "tools") from None
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{key}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    if request.parallel_tool_calls is False:
        schema["maxItems"] = 1
    return schema


def forced_tool_parser(request: Any) -> ToolParser | None:
    """What reads an answer that was held to schema_for(request); None where that is None."""
    if isinstance(request.tool_choice, NamedToolChoice):
        return _NamedToolParser(request)
    if request.tool_choice == "required":
        return _RequiredToolParser(request)
    return None


class _RequiredToolParser(GrammarToolParser):
    def _parse(self) -> Steps[None]:
        source = self._source
        source.record()
        try:
            yield from source.blank()
            yield from self._call_array()
            source.end_record()
        except BrokenFormat:
            self._unread()
        yield from self._pass_content()


class _NamedToolParser(GrammarToolParser):
    def _parse(self) -> Steps[None]:
        source = self._source
        source.record()
        try:
            yield from source.blank()
            if (yield from source.peek()) == "{":
                self._announce(self._request.tool_choice.function.name)
                yield from pass_value(source, self._argue)
        except BrokenFormat:
            pass
        self._unread()
        yield from self._pass_content()


def _arguments_schema(tool: Any) -> dict[str, Any]:
    return {"type": "object"} | (tool.parameters or {})


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to its own root leading to `place`."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in _VALUES:
            moved[key] = value
        elif key in _BY_NAME and isinstance(value, dict):
            moved[key] = {name: _moved(part, place) for name, part in value.items()}
        else:
            moved[key] = _moved(value, place)
    return moved
