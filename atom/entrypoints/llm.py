"""The offline API: `LLM(model=...)`, then generate, chat or stream."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from atom.entrypoints.progress import RequestProgress
from atom.model_engine.input_processor import Prompt
from atom.model_engine.llm_engine import LLMEngine
from atom.model_engine.output_processor import OutputKind
from atom.model_engine.outputs import RequestOutput
from atom.sampling_params import SamplingParams
from atom.utils.errors import RequestError
from atom.utils.logging import get_logger

logger = get_logger(__name__)

Message = dict[str, Any]  # {"role": "user", "content": "..."}
Conversation = list[Message]

_DEFAULT_MAX_TOKENS = SamplingParams().max_tokens


class LLM:
    """A model and its engine in this process.

    model: a folder, a GGUF file, a name on the hub, or "smollm2", the embedded model. Keyword arguments
    are the fields of Config or EngineArgs; a mistyped one raises ConfigError with the nearest right name.
    Use it as a context manager, or call close().
    """

    def __init__(self, model: str = "smollm2", **kwargs: Any) -> None:
        from atom.config import config_from_kwargs

        self._attach(LLMEngine(config_from_kwargs(model, **kwargs)))

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> "LLM":
        """Around an engine that exists, which the LLM then owns."""
        llm = cls.__new__(cls)
        llm._attach(engine)
        return llm

    def _attach(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._num_requests = 0
        self._sinks: dict[str, Callable[[RequestOutput], None]] = {}  # who waits for a request's outputs
        self._told_of_default_length = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Answer one prompt or many; outputs in the order of the prompts.

        A prompt is text, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}; parameters
        are one for all or one a prompt. Of several prompts, a wrong one gives an output with `error` set
        and no answers, and the others run; a single prompt that is wrong raises RequestError.
        use_tqdm: show progress, if stderr is a terminal.
        """
        single = _is_prompt(prompts)
        items: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        params = _one_each("sampling_params", sampling_params or SamplingParams(), SamplingParams, len(items))
        priorities = _one_each("priority", priority, int, len(items))
        results: list[RequestOutput | None] = [None] * len(items)
        ids: list[str] = []
        try:
            with RequestProgress(len(items), enabled=use_tqdm) as progress:

                def finish(index: int, output: RequestOutput) -> None:
                    results[index] = output
                    progress.advance(output)

                for index, prompt in enumerate(items):
                    try:
                        request_id = self._add(
                            prompt,
                            params[index],
                            OutputKind.FINAL,
                            partial(finish, index),
                            priority=priorities[index],
                            cache_salt=cache_salt,
                        )
                    except RequestError as error:
                        if single:
                            raise
                        logger.error("prompt %d is rejected: %s", index, error)
                        finish(index, _rejected(str(index), prompt, error))
                    else:
                        ids.append(request_id)
                while progress.done < len(items):
                    self._step()
        finally:
            self._drop(ids)  # those still running, if the user interrupted or the engine failed
        outputs = [result for result in results if result is not None]
        self._mention_default_length(outputs, params)
        return outputs

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many: `generate` through the model's chat template (or the given one)."""
        single = not messages or isinstance(messages[0], dict)
        prompts = [
            self.chat_prompt(
                conversation,  # type: ignore[arg-type]
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **template_kwargs,
            )
            for conversation in ([messages] if single else messages)
        ]
        return self.generate(prompts[0] if single else prompts, sampling_params, use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Iterator[RequestOutput]:
        """Outputs as they come, each with what is new: `output.outputs[0].text` is the next piece.

        The request starts with the first next(), which raises RequestError if it is wrong; closing the
        iterator early aborts it. Streams may interleave with each other and with generate().
        """
        news: deque[RequestOutput] = deque()
        params = sampling_params or SamplingParams()
        options: dict[str, Any] = {"priority": priority, "cache_salt": cache_salt}
        request_id = self._add(prompt, params, OutputKind.DELTA, news.append, **options)
        try:
            while True:
                while not news:
                    self._step()
                output = news.popleft()
                yield output
                if output.finished:
                    return
        finally:
            self._drop([request_id])

    def chat_prompt(
        self,
        messages: Conversation,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> dict[str, Any]:
        """A conversation as a prompt for generate() or stream()."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise RequestError("messages: the model has no tokenizer, so no chat template", "messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise RequestError('messages must be a list like [{"role": "user", "content": "Hello"}]', "messages")
        if chat_template is None and not tokenizer.chat_template:
            raise RequestError("messages: the model has no chat template; give chat_template", "chat_template")
        try:
            text = tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_kwargs,
            )
        except Exception as error:  # templates are programs: whatever they raise is about these messages
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RequestError(f"messages do not fit the chat template: {reason}", "messages") from None
        # The template writes the special tokens itself.
        ids = self.engine.input_processor.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None for a dummy model without one."""
        return self.engine.tokenizer

    def reset_prefix_cache(self) -> bool:
        return self.engine.reset_prefix_cache()

    def start_profile(self) -> None:
        self.engine.start_profile()

    def stop_profile(self) -> str | None:
        return self.engine.stop_profile()

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        kind: OutputKind,
        sink: Callable[[RequestOutput], None],
        **options: Any,
    ) -> str:
        request_id = str(self._num_requests)
        self._num_requests += 1
        self.engine.add_request(request_id, prompt, params, output_kind=kind, **options)
        self._sinks[request_id] = sink
        return request_id

    def _step(self) -> None:
        """One engine step; outputs go to whoever waits for them."""
        assert self.engine.has_unfinished_requests(), "waiting for an output that can't come"
        for output in self.engine.step():
            sink = self._sinks.pop(output.request_id) if output.finished else self._sinks[output.request_id]
            sink(output)

    def _drop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._sinks.pop(request_id, None) is not None:
                self.engine.abort_request(request_id)

    def _mention_default_length(self, outputs: list[RequestOutput], params: Sequence[SamplingParams]) -> None:
        if self._told_of_default_length:
            return
        for output, asked in zip(outputs, params, strict=True):
            if asked.max_tokens != _DEFAULT_MAX_TOKENS or asked.ignore_eos:
                continue
            if any(a.finish_reason == "length" and len(a.token_ids) == _DEFAULT_MAX_TOKENS for a in output.outputs):
                self._told_of_default_length = True
                logger.warning(
                    "an answer was cut at %d tokens, the default; SamplingParams(max_tokens=...) allows more",
                    _DEFAULT_MAX_TOKENS,
                )
                return


def _is_prompt(prompts: Any) -> bool:
    """Whether it is one prompt, not a sequence of prompts."""
    if isinstance(prompts, str | dict):
        return True
    if isinstance(prompts, Sequence):
        return len(prompts) > 0 and hasattr(prompts[0], "__index__")
    if hasattr(prompts, "ndim"):  # numpy and torch
        return bool(prompts.ndim == 1)
    raise RequestError(f"prompts must be a prompt or a list of prompts, not {type(prompts).__name__}", "prompt")


def _one_each(name: str, value: Any, kind: type, count: int) -> Sequence[Any]:
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RequestError(f"{name} must be one {kind.__name__} or one a prompt, not {type(value).__name__}", name)
    if len(value) != count:
        raise RequestError(f"{name}: {len(value)} for {count} prompts; give one for all or one each", name)
    return value


def _rejected(request_id: str, prompt: Any, error: RequestError) -> RequestOutput:
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    return RequestOutput(
        request_id=request_id,
        prompt=text if isinstance(text, str) else None,
        prompt_token_ids=[],
        outputs=[],
        finished=True,
        error=str(error),
    )
