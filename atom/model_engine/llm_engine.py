"""The engine as its users drive it: add requests, step, read outputs. Everything above the engine core."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from atom.model_engine.detokenizer import DetokenizerFactory
from atom.model_engine.engine_client import make_client
from atom.model_engine.input_processor import InputProcessor, Prompt
from atom.model_engine.output_processor import OutputKind, OutputProcessor
from atom.model_engine.outputs import RequestOutput
from atom.sampling_params import SamplingParams
from atom.utils import startup
from atom.utils.errors import ModelLoadError, RequestError
from atom.utils.logging import get_logger

if TYPE_CHECKING:
    from atom.config import Config

logger = get_logger(__name__)


class LLMEngine:
    """Not thread-safe: one thread adds and steps. A wrong request raises RequestError and harms no other."""

    def __init__(self, config: "Config") -> None:
        self.config = config
        self._closed = False
        with startup.measured():
            self._start(config)

    def _start(self, config: "Config") -> None:
        # Reading a vocabulary and loading weights take seconds each, and mostly not of the same resource.
        tokenizer = _Background(lambda: load_tokenizer_if_any(config))
        self.client = make_client(config)
        try:
            with startup.phase("tokenizer, after the rest"):
                self.tokenizer = tokenizer.result()
        except BaseException:
            self.client.close()
            raise
        # After the client, which may have shrunk a limit that the user left open to what memory holds.
        assert config.max_model_len is not None
        self.input_processor = InputProcessor(
            self.tokenizer,
            vocab_size=config.hf_config.vocab_size,
            max_model_len=config.max_model_len,
            end_token_ids=config.end_token_ids,
            seed=config.seed,
        )
        self.output_processor = OutputProcessor(DetokenizerFactory(self.tokenizer))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        output_kind: OutputKind = OutputKind.CUMULATIVE,
    ) -> None:
        """Queue a request; lower priority values are served first, and only equal salts share a prefix cache.

        Raises RequestError if the prompt or a parameter is wrong or the id is in use.
        """
        processed = self.input_processor.process(
            request_id, prompt, sampling_params, priority=priority, cache_salt=cache_salt
        )
        taken = self.output_processor.is_engine_id
        if request_id in self.output_processor or any(taken(child.request_id) for child in processed.children):
            raise RequestError(f"request_id {request_id!r} is in use by an unfinished request", "request_id")
        self.output_processor.add(processed, output_kind)
        try:
            for child in processed.children:
                self.client.add_request(child)
        except BaseException:
            self.abort_request(request_id)
            raise

    def step(self) -> list[RequestOutput]:
        """Run the engine for one step: what changed for whom. [] when idle or nothing is to be told."""
        result = self.output_processor.process(self.client.step())
        if result.abort_ids:
            self.client.abort(result.abort_ids)
        return result.request_outputs

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Stop a request at any stage; its output so far, or None if it isn't running."""
        output, engine_ids = self.output_processor.abort(request_id)
        if engine_ids:
            self.client.abort(engine_ids)
        return output

    def has_unfinished_requests(self) -> bool:
        return self.output_processor.has_unfinished()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False, and nothing happens, while requests run."""
        return self.client.reset_prefix_cache()

    def start_profile(self) -> None:
        self.client.start_profile()

    def stop_profile(self) -> str | None:
        """The path of the trace, or None when none was running."""
        return self.client.stop_profile()

    def stats(self) -> dict[str, float]:
        return self.client.stats()

    def describe(self) -> dict[str, Any]:
        """The memory plan."""
        return self.client.describe()

    def close(self) -> None:
        """Release the model and the cache; may be called twice."""
        if not self._closed:
            self._closed = True
            self.client.close()

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Background:
    """A call in a thread of its own, which an exit of the program doesn't wait for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def load_tokenizer_if_any(config: "Config") -> Any | None:
    """None for a dummy model without one. ModelLoadError."""
    from atom.model_loader.tokenizer import load_tokenizer

    try:
        return load_tokenizer(config)
    except ModelLoadError as error:
        if not config.load_dummy:
            raise
        logger.info("no tokenizer (%s): prompts must be token ids, and answers have no text", error)
        return None
