"""The request of /v1/responses, and the chat that it stands for."""

from typing import Any, Literal

from pydantic import Field

from atom.entrypoints.openai.conversion import Turns, function_of, json_schema_format, kind_of, string_of, text_of
from atom.entrypoints.openai.protocol import (
    ApiModel,
    ChatCompletionRequest,
    ChatMessage,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from atom.utils.errors import RequestError

# A chat's fields as this protocol calls what they are made of.
NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "structured_output": "text.format",
}
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_REASONING_PARTS = {"reasoning_text": "text", "summary_text": "text", "text": "text"}
_PASSED_ON = (
    "model", "temperature", "top_p", "stream", "user", "parallel_tool_calls", "top_k", "min_p", "seed",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "priority", "cache_salt",
)  # fmt: skip


class TextFormat(ApiModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(ApiModel):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(ApiModel):
    effort: str | None = Field(default=None, max_length=32)
    summary: str | None = None


class ResponsesRequest(ApiModel):
    model: str | None = Field(default=None, description="a name of /v1/models; the served model if left out")
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = True
    previous_response_id: str | None = Field(default=None, max_length=256)
    user: str | None = None

    # Known, so that they are refused instead of ignored
    background: bool | None = False
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    truncation: str | None = "disabled"
    top_logprobs: int | None = None
    include: list[str] | None = None

    # Beyond OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    priority: int | None = None
    cache_salt: str | None = Field(default=None, max_length=256)
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """RequestError for what this server doesn't do."""
        if self.background:
            raise RequestError(
                "background=true is not supported; responses are made while the client waits", "background"
            )
        for name in ("conversation", "prompt"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is not supported; send the conversation as input", name)
        if self.truncation not in (None, "disabled"):
            raise RequestError("truncation must be 'disabled'; inputs are never cut", "truncation")
        if self.top_logprobs:
            raise RequestError("top_logprobs is not supported here; /v1/chat/completions has it", "top_logprobs")
        if "message.output_text.logprobs" in (self.include or ()):
            raise RequestError(
                "include: 'message.output_text.logprobs' is not supported here; /v1/chat/completions has it", "include"
            )
        metadata = self.metadata or {}
        if len(metadata) > MAX_METADATA:
            raise RequestError(f"metadata has {len(metadata)} keys; at most {MAX_METADATA} are allowed", "metadata")
        for key, value in metadata.items():
            if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
                raise RequestError(
                    f"metadata: keys may have {MAX_METADATA_KEY} characters and values {MAX_METADATA_VALUE}", "metadata"
                )

    def chat(self, history: list[ChatMessage]) -> tuple[ChatCompletionRequest, list[ChatMessage]]:
        """(the request to the chat service, the conversation so far without the instructions). RequestError."""
        turns = Turns(history)
        add_input(turns, self.input)
        if not turns.messages:
            raise RequestError("input is empty; it needs at least one message", "input")
        options: dict[str, Any] = {name: getattr(self, name) for name in _PASSED_ON}
        kwargs = dict(self.chat_template_kwargs or {})
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort == "none":
            kwargs = {"enable_thinking": False, "thinking": False} | kwargs
        elif effort is not None:
            options["reasoning_effort"] = effort
        request = ChatCompletionRequest(
            messages=_instructed(self.instructions, turns.messages),
            max_completion_tokens=self.max_output_tokens,
            tools=self._tools(),
            tool_choice=self._tool_choice(),
            response_format=self._format(),
            chat_template_kwargs=kwargs or None,
            **options,
        )
        return request, turns.messages

    def _tools(self) -> list[Tool] | None:
        tools = []
        for index, tool in enumerate(self.tools or ()):
            at = f"tools[{index}]"
            kind = kind_of(tool, at)
            if kind != "function":
                raise RequestError(f"{at}: tools of type {kind!r} are not supported; use 'function'", "tools")
            tools.append(Tool(function=function_of(tool, at, "parameters")))
        return tools or None

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if choice in (None, "none", "auto", "required"):
            return choice
        if isinstance(choice, dict) and choice.get("type") == "function":
            return NamedToolChoice(function=NamedFunction(name=string_of(choice, "name", "tool_choice")))
        raise RequestError("tool_choice must be 'none', 'auto', 'required' or {type: 'function', name}", "tool_choice")

    def _format(self) -> ResponseFormat | None:
        form = self.text.format if self.text is not None else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return ResponseFormat(type="json_object")
        if form.schema_ is None:
            raise RequestError("text.format.schema is missing", "text.format")
        return json_schema_format(form.schema_)


def add_input(turns: Turns, given: str | list[dict[str, Any]]) -> None:
    """The request's input, at the end of the conversation. RequestError."""
    if isinstance(given, str):
        turns.say("user", given)
        return
    for index, item in enumerate(given):
        at = f"input[{index}]"
        kind = kind_of(item, at, "message")
        if kind == "message":
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise RequestError(f"{at}.role must be one of user, assistant, system and developer", "input")
            turns.say(role, text_of(item.get("content"), f"{at}.content", _TEXT_PARTS))
        elif kind == "function_call":
            turns.call(string_of(item, "call_id", at), string_of(item, "name", at), string_of(item, "arguments", at))
        elif kind == "function_call_output":
            turns.result(string_of(item, "call_id", at), text_of(item.get("output"), f"{at}.output", _TEXT_PARTS))
        elif kind == "reasoning":
            if item.get("content"):
                turns.think(text_of(item["content"], f"{at}.content", _REASONING_PARTS))
        else:
            raise RequestError(f"{at}: items of type {kind!r} are not supported", "input")


def _instructed(instructions: str | None, messages: list[ChatMessage]) -> list[ChatMessage]:
    """With the instructions first; many templates take a single system message."""
    if not instructions:
        return messages
    first = messages[0]
    if first.role in ("system", "developer"):
        return [ChatMessage(role="system", content=f"{instructions}\n{first.content}"), *messages[1:]]
    return [ChatMessage(role="system", content=instructions), *messages]
