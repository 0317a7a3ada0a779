"""A conversation as a prompt: messages checked and normalized, then the model's template, in transformers' sandbox."""

import json
from typing import Any

from atom.entrypoints.openai.protocol import ChatMessage, Tool
from atom.model_engine.async_llm_engine import AsyncLLMEngine
from atom.model_engine.input_processor import InputProcessor
from atom.utils.errors import RequestError

_INLINE_CHARACTERS = 4096  # longer conversations are rendered off the event loop
# What a request may not set through chat_template_kwargs: it would change what is run, not what is said.
_RESERVED = frozenset(
    {"chat_template", "tokenize", "messages", "conversation", "tools", "documents", "return_dict", "return_tensors",
     "padding", "truncation", "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask"}
)  # fmt: skip


class ChatTemplate:
    """The template a server uses: the flag's text or the model's own."""

    def __init__(self, engine: AsyncLLMEngine, given: str | None = None) -> None:
        self._engine = engine
        self._template = given

    async def prompt(
        self,
        messages: list[ChatMessage],
        tools: list[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """{"prompt": text, "prompt_token_ids": ids}. Raises RequestError for what doesn't fit the template."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise RequestError("messages: the model has no tokenizer, so no chat template", "messages")
        if self._template is None and not tokenizer.chat_template:
            raise RequestError(
                "messages: the model has no chat template; start the server with --chat-template", "messages"
            )
        if continue_final_message and add_generation_prompt:
            add_generation_prompt = False
        options = dict(template_kwargs or {})
        forbidden = sorted(_RESERVED & set(options))
        if forbidden:
            raise RequestError(f"chat_template_kwargs: {forbidden[0]!r} can't be set there", "chat_template_kwargs")
        conversation = [_plain_message(message) for message in messages]
        plain_tools = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None

        def render(processor: InputProcessor) -> dict[str, Any]:
            assert processor.tokenizer is not None
            try:
                text = processor.tokenizer.apply_chat_template(
                    conversation,
                    tools=plain_tools,
                    chat_template=self._template,
                    tokenize=False,
                    **(
                        options
                        | {
                            "add_generation_prompt": add_generation_prompt,
                            "continue_final_message": continue_final_message,
                        }
                    ),
                )
            except Exception as error:  # templates are programs: whatever they raise is about these messages
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise RequestError(f"messages do not fit the chat template: {reason:.300}", "messages") from None
            try:
                ids = processor.encode(text, add_special_tokens=add_special_tokens)
            except RequestError as error:
                raise RequestError(str(error).replace("prompt ", "messages: the prompt ", 1), "prompt") from None
            return {"prompt": text, "prompt_token_ids": ids}

        size = sum(len(m["content"]) for m in conversation if isinstance(m.get("content"), str))
        if size + 64 * len(conversation) <= _INLINE_CHARACTERS and not plain_tools:
            return render(self._engine.input_processor)
        result: dict[str, Any] = await self._engine.in_thread(render)
        return result


def _plain_message(message: ChatMessage) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = _text_of(message.content)
    if message.content is None and message.role != "assistant":
        raise RequestError(f"messages: content of a {message.role} message is missing", "messages")
    for call in plain.get("tool_calls", ()):
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            # Templates write the arguments as JSON themselves.
            try:
                call["function"]["arguments"] = json.loads(arguments) if arguments else {}
            except (ValueError, RecursionError):
                raise RequestError("messages: arguments of a tool call are not valid JSON", "messages") from None
    return plain


def _text_of(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise RequestError(
                f"messages: content of type {kind!r:.100} is not supported; the model reads text", "messages"
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise RequestError("messages: a text part needs a string 'text'", "messages")
        texts.append(text)
    return "\n".join(texts)
