"""The requests of the HTTP API: OpenAI's fields, and those of vLLM that its users know.

Types are checked here, values where they are used (SamplingParams, InputProcessor), so that the Python and
the HTTP API refuse the same things in the same words. Unknown fields are ignored, as clients send many.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from atom.sampling_params import SamplingParams

UNLIMITED_TOKENS = 2**31 - 1  # the input processor lowers it to the room there is


class ApiModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(ApiModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(ApiModel):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(ApiModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class SamplingFields(ApiModel):
    """What both completion APIs share."""

    model: str | None = Field(default=None, description="a name of /v1/models; the served model if left out")
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    # Beyond OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = Field(default=None, description="lower values are served first")
    cache_salt: str | None = Field(default=None, max_length=256, description="only equal salts share cached prefixes")
    return_token_ids: bool | None = None

    # Structured output
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def make_sampling_params(self, **fixed: Any) -> SamplingParams:
        """Of the fields that were given; `fixed` win unless they are None. Raises RequestError."""
        values = {name: getattr(self, name) for name in _SAMPLING_NAMES}
        values |= {"stop_strings": self.stop} | fixed
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})


_SAMPLING_NAMES = (
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p",
    "repetition_penalty", "stop_token_ids", "min_tokens", "ignore_eos", "prompt_logprobs", "skip_special_tokens",
)  # fmt: skip


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class FunctionCall(ApiModel):
    name: str
    arguments: str | None = None


class ToolCall(ApiModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ApiModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(ApiModel):
    name: str = Field(max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiModel):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(ApiModel):
    name: str


class NamedToolChoice(ApiModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatCompletionRequest(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None

    # Beyond OpenAI's
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool = True

    @property
    def usable_tools(self) -> list[Tool] | None:
        """What the model is told of, and may call."""
        return None if self.tool_choice == "none" else self.tools


class TokenizeRequest(ApiModel):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(ApiModel):
    model: str | None = None
    tokens: list[int]


class EmbeddingRequest(ApiModel):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
