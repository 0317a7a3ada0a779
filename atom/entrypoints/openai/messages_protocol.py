"""The requests of /v1/messages, and the chat that they stand for."""

import json
from typing import Any, Literal

from pydantic import Field

from atom.entrypoints.openai.conversion import (
    Turns,
    function_of,
    json_schema_format,
    kind_of,
    string_of,
    text_of,
)
from atom.entrypoints.openai.protocol import (
    ApiModel,
    ChatCompletionRequest,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from atom.utils.errors import RequestError

# A chat's fields as this protocol calls what they are made of.
NAMES = {
    "prompt": "messages",
    "stop_strings": "stop_sequences",
    "response_format": "output_config",
    "structured_output": "output_config",
}
_TEXT = {"text": "text"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_PASSED_ON = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "priority", "cache_salt")


class Message(ApiModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Thinking(ApiModel):
    """budget_tokens has no effect: reasoning counts towards max_tokens."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1)


class ToolChoice(ApiModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(ApiModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ApiModel):
    format: OutputFormat | None = None
    effort: str | None = Field(default=None, max_length=32)


class Metadata(ApiModel):
    user_id: str | None = Field(default=None, max_length=512)


class CountTokensRequest(ApiModel):
    """What makes the prompt."""

    model: str | None = Field(default=None, description="a name of /v1/models; the served model if left out")
    messages: list[Message] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # beyond Anthropic's

    @property
    def thinks(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    def chat(self) -> ChatCompletionRequest:
        """The request to the chat service. RequestError."""
        turns = Turns()
        if self.system:
            turns.say("system", text_of(self.system, "system", _TEXT))
        for index, message in enumerate(self.messages):
            _add(turns, message, f"messages[{index}].content")
        continues = turns.messages[-1].role == "assistant"
        config = self.output_config
        choice = self.tool_choice
        return ChatCompletionRequest(
            messages=turns.messages,
            tools=self._tools(),
            tool_choice=self._choice(),
            parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
            reasoning_effort=config.effort if config is not None else None,
            response_format=_format(config),
            # Templates know the switch by one of these names.
            chat_template_kwargs={"enable_thinking": self.thinks, "thinking": self.thinks}
            | (self.chat_template_kwargs or {}),
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )

    def _tools(self) -> list[Tool] | None:
        tools = []
        for index, tool in enumerate(self.tools or ()):
            at = f"tools[{index}]"
            kind = kind_of(tool, at, "custom")
            if kind != "custom":
                raise RequestError(f"{at}: tools of type {kind!r} are not supported; use 'custom'", "tools")
            if tool.get("input_schema") is None:
                raise RequestError(f"{at}.input_schema is missing", "tools")
            tools.append(Tool(function=function_of(tool, at, "input_schema")))
        return tools or None

    def _choice(self) -> Any:
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type != "tool":
            return _CHOICES[choice.type]
        if choice.name is None:
            raise RequestError("tool_choice.name is missing", "tool_choice")
        return NamedToolChoice(function=NamedFunction(name=choice.name))


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = False
    metadata: Metadata | None = None

    # Beyond Anthropic's
    min_p: float | None = None
    seed: int | None = None
    priority: int | None = None
    cache_salt: str | None = Field(default=None, max_length=256)

    def chat(self) -> ChatCompletionRequest:
        given = {name: getattr(self, name) for name in _PASSED_ON}
        more = {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences, "stream": bool(self.stream)}
        return super().chat().model_copy(update=given | more)


def _add(turns: Turns, message: Message, where: str) -> None:
    if isinstance(message.content, str):
        turns.say(message.role, message.content)
        return
    for index, block in enumerate(message.content):
        at = f"{where}[{index}]"
        kind = kind_of(block, at)
        if kind == "text":
            turns.say(message.role, string_of(block, "text", at))
        elif kind == "tool_result" and message.role == "user":
            text = text_of(block.get("content") or "", f"{at}.content", _TEXT)
            # Templates know no failed results: the model has to read of it.
            turns.result(string_of(block, "tool_use_id", at), f"Error: {text}" if block.get("is_error") else text)
        elif kind == "tool_use" and message.role == "assistant":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise RequestError(f"{at}.input must be an object", "messages")
            turns.call(
                string_of(block, "id", at), string_of(block, "name", at), json.dumps(arguments, ensure_ascii=False)
            )
        elif kind == "thinking" and message.role == "assistant":
            turns.think(string_of(block, "thinking", at))
        elif kind != "redacted_thinking":
            raise RequestError(
                f"{at}: type {kind!r} is not supported in messages of role {message.role!r}; the model reads text",
                "messages",
            )
    if not turns.messages:
        raise RequestError(f"{where} is empty", "messages")


def _format(config: OutputConfig | None) -> ResponseFormat | None:
    return None if config is None or config.format is None else json_schema_format(config.format.schema_)
