"""/tokenize and /detokenize."""

from typing import Any

from atom.entrypoints.openai.chat_template import ChatTemplate
from atom.entrypoints.openai.context import ServingContext
from atom.entrypoints.openai.protocol import DetokenizeRequest, TokenizeRequest
from atom.model_engine.input_processor import InputProcessor
from atom.utils.errors import RequestError

_INLINE_TOKENS = 2048


async def tokenize(context: ServingContext, template: ChatTemplate, request: TokenizeRequest) -> dict[str, Any]:
    context.check_model(request.model)
    engine = context.engine
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    if request.messages is not None:
        prompt = await template.prompt(
            request.messages,
            request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=bool(request.add_special_tokens),
            template_kwargs=request.chat_template_kwargs,
        )
        tokens = prompt["prompt_token_ids"]
    else:
        assert request.prompt is not None
        tokens = await engine.encode(request.prompt, request.add_special_tokens is not False)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.config.max_model_len, "tokens": tokens}
    if request.return_token_strs:
        answer["token_strs"] = [engine.detokenizers.token_text(token) for token in tokens]
    return answer


async def detokenize(context: ServingContext, request: DetokenizeRequest) -> dict[str, Any]:
    context.check_model(request.model)
    engine, tokens = context.engine, request.tokens
    if engine.tokenizer is None:
        raise RequestError("tokens: the model has no tokenizer", "tokens")
    vocab_size = engine.config.hf_config.vocab_size
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"tokens: {wrong} is not in the vocabulary (0 to {vocab_size - 1})", "tokens")

    def decode(processor: InputProcessor) -> str:
        assert processor.tokenizer is not None
        return str(processor.tokenizer.decode(tokens))

    if len(tokens) <= _INLINE_TOKENS:
        return {"prompt": decode(engine.input_processor)}
    return {"prompt": await engine.in_thread(decode)}
