"""The engine for asyncio: an engine core in its own process, any number of streams in this one.

Everything runs on the event loop's thread except what takes long: loading, and tokenizing long texts. The
core's messages are read in a callback of the loop, turned into text there, and left with each request's
stream; a stream that nobody reads grows by merging and holds up nobody.
"""

import asyncio
import contextlib
import copy
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from atom.model_engine import wire
from atom.model_engine.config_transport import config_to_plain
from atom.model_engine.core_connection import CoreConnection, CoreStartError, EngineDeadError
from atom.model_engine.detokenizer import DetokenizerFactory
from atom.model_engine.input_processor import InputProcessor, Prompt
from atom.model_engine.llm_engine import load_tokenizer_if_any
from atom.model_engine.output_processor import OutputKind, OutputProcessor
from atom.model_engine.outputs import RequestOutput
from atom.model_engine.protocol import EngineRequest, StepOutputs
from atom.sampling_params import SamplingParams
from atom.utils import startup
from atom.utils.errors import RequestError
from atom.utils.logging import get_logger

if TYPE_CHECKING:
    from atom.config import Config

logger = get_logger(__name__)

_INLINE_CHARACTERS = 4096  # a longer text is tokenized off the loop: it would hold up the others for over 1 ms
_MISSED_HEARTBEATS = 30  # then a core that still exists counts as dead
_CALL_SECONDS = 120.0
_RESTARTS = 5  # attempts to start a core again, the wait doubling from one second
_UNREAD_SECONDS = 60.0  # a stream with news that nobody reads for so long is dropped

__all__ = ["AsyncLLMEngine", "EngineDeadError", "EngineListener", "OutputKind", "RequestStream", "StreamDroppedError"]


class StreamDroppedError(RuntimeError):
    """The engine ended a stream that its user still wanted: unread for too long, out of time, or shutting down."""


class EngineListener(Protocol):
    """Told what passes, on the event loop; for metrics. Must be quick and not raise."""

    def submitted(self, requests: Sequence[EngineRequest]) -> None: ...

    def stepped(self, outputs: StepOutputs) -> None: ...

    def ended(self, request_ids: Sequence[str], reason: str) -> None:
        """By this process, not the core: "stop" (at a stop string), "abort" or "error"."""


class Signal:
    """Wakes one waiting task; streams that are read together share one."""

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None
        self._is_set = False

    def set(self) -> None:
        self._is_set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until it is set, which it then no longer is."""
        if not self._is_set:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_set = False


class RequestStream:
    """The outputs of one request, as an asynchronous iterator; close() aborts what is still running.

    What isn't read in time is merged into the next output, so that a slow reader gets fewer, larger ones.
    """

    def __init__(
        self, engine: "AsyncLLMEngine", request_id: str, prompt_token_ids: list[int], kind: OutputKind, signal: Signal
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self._merges = kind is OutputKind.DELTA
        self._engine = engine
        self._signal = signal
        self._pending: RequestOutput | None = None
        self._error: Exception | None = None
        self._done = False  # nothing will be put any more
        self.unread_since = 0.0  # time.monotonic(), while something is pending
        self.on_end: Callable[[], object] | None = None  # called once, when nothing will be put any more

    def take(self) -> RequestOutput | None:
        """What has come since the last call, without waiting. Raises what ended the stream."""
        if self._pending is not None:
            output, self._pending = self._pending, None
            return output
        if self._error is not None:
            raise self._error
        return None

    @property
    def has_unread(self) -> bool:
        return self._pending is not None

    @property
    def exhausted(self) -> bool:
        return self._done and self._pending is None and self._error is None

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            output = self.take()
            if output is not None:
                return output
            if self._done:
                raise StopAsyncIteration
            await self._signal.wait()

    def close(self) -> None:
        """Abort the request unless it has ended; its blocks are free before the next step."""
        if not self._done:
            self._end()
            self._engine.abort(self.request_id)

    def put(self, output: RequestOutput) -> None:
        if self._pending is None:
            self._pending = output
            self.unread_since = time.monotonic()
        elif self._merges:
            _merge(self._pending, output)
        else:
            self._pending = output  # it says all that the other did
        if output.finished:
            self._end()
        self._signal.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._end()
        self._signal.set()

    def _end(self) -> None:
        self._done = True
        if self.on_end is not None:
            self.on_end()
            self.on_end = None


class AsyncLLMEngine:
    """Made by `await AsyncLLMEngine.create(config)`; for one event loop, the one that ran create."""

    def __init__(self, config: "Config", settings: dict[str, Any], listener: EngineListener | None) -> None:
        self.config = config
        self.tokenizer: Any | None = None
        self.death: str | None = None  # why there is no core, while there is none
        self.num_restarts = 0
        self._settings = settings
        self._listener = listener
        self._restart_core = False
        self._loop = asyncio.get_running_loop()
        self._core: CoreConnection | None = None
        self._plan: dict[str, Any] = {}
        self.startup: dict[str, float] = {}  # seconds by phase of the core's start
        self._stats: dict[str, float] = {}
        self._streams: dict[str, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[bool | str | None]] = {}
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._thread_state = threading.local()
        self._closed = False

    # -- life --

    @classmethod
    async def create(
        cls,
        config: "Config",
        *,
        core: CoreConnection | None = None,
        restart: bool = False,
        listener: EngineListener | None = None,
    ) -> "AsyncLLMEngine":
        """Start a core and wait until it has loaded the model.

        core: one that loads it already. restart: replace a core that dies; requests it had fail all the same.
        Raises CoreStartError and ModelLoadError (user's mistakes), EngineDeadError.
        """
        engine = cls(config, config_to_plain(config), listener)
        engine._restart_core = restart
        try:
            start = asyncio.ensure_future(engine._start_core(core))
            try:
                with startup.phase("tokenizer"):  # while the core starts
                    engine.tokenizer = await asyncio.to_thread(load_tokenizer_if_any, config)
            except BaseException:
                start.cancel()
                with contextlib.suppress(BaseException):
                    await start
                raise
            with startup.phase("engine process"):
                await start
            if (timer := startup.current()) is not None:
                timer.split_up("engine process", engine.startup, "engine: ")
        except BaseException:
            await engine.close(grace=0)
            raise
        assert config.max_model_len is not None
        engine.input_processor = InputProcessor(
            engine.tokenizer,
            vocab_size=config.hf_config.vocab_size,
            max_model_len=config.max_model_len,
            end_token_ids=config.end_token_ids,
            seed=config.seed,
        )
        engine.detokenizers = DetokenizerFactory(engine.tokenizer)
        engine._outputs = OutputProcessor(engine.detokenizers)
        engine._spawn(engine._watch())
        return engine

    input_processor: InputProcessor
    detokenizers: DetokenizerFactory
    _outputs: OutputProcessor

    @property
    def is_healthy(self) -> bool:
        """Whether a core is there to serve requests."""
        return self._core is not None and self.death is None and not self._closed

    @property
    def core_pid(self) -> int | None:
        return None if self._core is None else self._core.pid

    async def close(self, grace: float = 5.0) -> None:
        """End the core; what still runs fails. May be called twice."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        core, self._core = self._core, None
        if core is not None:
            self._loop.remove_reader(core.fd)
            await asyncio.to_thread(core.close, grace)
        self._fail_everything(StreamDroppedError("the engine was shut down"))
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- requests --

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        output_kind: OutputKind = OutputKind.DELTA,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they come. Ending the iteration early, by close or cancellation, aborts the request.

        Raises RequestError if the request is wrong, EngineDeadError if the engine fails while it runs.
        """
        stream = await self.submit(
            prompt,
            sampling_params,
            request_id,
            priority=priority,
            cache_salt=cache_salt,
            output_kind=output_kind,
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        output_kind: OutputKind = OutputKind.DELTA,
        signal: Signal | None = None,
    ) -> RequestStream:
        """As generate, but the request has been checked and queued when this returns. Close the stream.

        signal: shared by streams that one task reads together.
        """
        self._require_core()
        if isinstance(prompt, str) and len(prompt) > _INLINE_CHARACTERS:
            prompt = {"prompt": prompt, "prompt_token_ids": await self.encode(prompt)}
            self._require_core()
        if sampling_params.structured_output is not None:
            await self.in_thread(lambda processor: processor.grammar_of(sampling_params))  # known from then on
            self._require_core()
        request_id = request_id if request_id is not None else f"request-{next(self._ids)}"
        processed = self.input_processor.process(
            request_id, prompt, sampling_params, priority=priority, cache_salt=cache_salt
        )
        taken = self._outputs.is_engine_id
        if request_id in self._outputs or any(taken(child.request_id) for child in processed.children):
            raise RequestError(f"request_id {request_id!r} is in use by an unfinished request", "request_id")
        core = self._core
        assert core is not None
        self._outputs.add(processed, output_kind)
        stream = RequestStream(self, request_id, processed.prompt_token_ids, output_kind, signal or Signal())
        self._streams[request_id] = stream
        if self._listener is not None:
            self._listener.submitted(processed.children)
        for child in processed.children:
            self._send(core, wire.AddRequest(child))
        return stream

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request at any stage; its output so far, or None if it isn't running."""
        self._streams.pop(request_id, None)
        output, engine_ids = self._outputs.abort(request_id)
        self._abort_in_core(engine_ids)
        return output

    def drop(self, request_id: str, error: Exception) -> None:
        """Abort a request; its reader gets the error."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self.abort(request_id)
            stream.fail(error)

    def drop_all(self, error: Exception) -> None:
        for request_id in list(self._streams):
            self.drop(request_id, error)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, off the loop if it is long. RequestError if it can't be encoded."""
        if len(text) <= _INLINE_CHARACTERS:
            return self.input_processor.encode(text, add_special_tokens)
        return await self.in_thread(lambda processor: processor.encode(text, add_special_tokens))

    async def in_thread(self, call: Callable[[InputProcessor], Any]) -> Any:
        """The call's result, in a thread that has an InputProcessor (and tokenizer) of its own."""

        def run() -> Any:
            state = self._thread_state
            if not hasattr(state, "processor"):
                # Tokenizers are not safe to share between threads.
                state.processor = copy.copy(self.input_processor)
                state.processor.tokenizer = copy.deepcopy(self.tokenizer)
            return call(state.processor)

        return await self._loop.run_in_executor(self._threads, run)

    # -- state and control --

    @property
    def num_unfinished(self) -> int:
        """Requests whose answers have not all ended."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn: as the core said after its last step, or as must be."""
        return max(int(self._stats.get("waiting", 0)), len(self._streams) - self.config.max_num_seqs)

    def stats(self) -> dict[str, float]:
        """As of the last step."""
        return self._stats

    def describe(self) -> dict[str, Any]:
        """The memory plan."""
        return self._plan

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False, and nothing happens, while requests run."""
        return bool(await self._call("reset_prefix_cache"))

    async def start_profile(self) -> None:
        await self._call("start_profile")

    async def stop_profile(self) -> str | None:
        """The path of the trace, or None when none was running."""
        path = await self._call("stop_profile")
        return path if isinstance(path, str) else None

    # -- the core --

    async def _start_core(self, core: CoreConnection | None = None) -> None:
        core = core if core is not None else CoreConnection(self.config, self._settings)
        waiting = asyncio.ensure_future(asyncio.to_thread(core.wait_ready))
        try:
            ready = await asyncio.shield(waiting)
        except asyncio.CancelledError:
            core.kill()
            # The thread notices, and must have ended before the socket is closed.
            await asyncio.gather(waiting, return_exceptions=True)
            core.close(grace=0)
            raise
        except BaseException:
            core.close(grace=0)
            raise
        self._plan, self.startup = ready.plan, ready.startup
        self._core, self.death = core, None
        self._loop.add_reader(core.fd, self._receive, core)
        self._loop.call_soon(self._receive, core)
        threading.Thread(target=self._wait_for_death, args=(core,), name="core-watch", daemon=True).start()

    def _wait_for_death(self, core: CoreConnection) -> None:
        core.wait_ended()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._on_death, core)

    def _on_death(self, core: CoreConnection) -> None:
        if self._closed or core is not self._core:
            return
        self._receive(core)  # what it sent before
        self._loop.remove_reader(core.fd)
        self._core, self.death = None, core.describe_end()
        logger.error("%s; %d requests fail", self.death, len(self._streams))
        self._stats = {}
        self._fail_everything(EngineDeadError(self.death))
        core.close(grace=0)
        if self._restart_core:
            self._spawn(self._restart())

    async def _restart(self) -> None:
        for attempt in range(_RESTARTS):
            try:
                await self._start_core()
            except CoreStartError as error:
                logger.error("the engine core can't be restarted: %s", error)
                return
            except EngineDeadError as error:
                logger.error("restart %d of %d failed: %s", attempt + 1, _RESTARTS, error)
                await asyncio.sleep(2**attempt)
            else:
                self.num_restarts += 1
                logger.warning("the engine core was restarted")
                return

    async def _watch(self) -> None:
        """Once a second: is the core alive, are streams read."""
        missed, seen = 0, -1
        while True:
            await asyncio.sleep(1)
            core = self._core
            if core is not None:
                self._receive(core)  # should an edge of the socket ever be missed
                missed = 0 if core.heartbeats != seen else missed + 1
                seen = core.heartbeats
                if missed >= _MISSED_HEARTBEATS:
                    logger.error("no heartbeat of the engine core for %d s: ending it", missed)
                    missed = 0
                    core.kill()
            limit = time.monotonic() - _UNREAD_SECONDS
            for stream in list(self._streams.values()):
                if stream.unread_since < limit and stream.has_unread:
                    self.drop(
                        stream.request_id, StreamDroppedError(f"the answer was not read for {_UNREAD_SECONDS:.0f} s")
                    )

    def _send(self, core: CoreConnection, message: Any) -> None:
        core.send(message)
        # Sending may swallow the edge that would have told of a message.
        self._loop.call_soon(self._receive, core)

    def _receive(self, core: CoreConnection) -> None:
        if core is not self._core:
            return
        for message in core.receive():
            if isinstance(message, wire.Outputs):
                self._stats = message.stats
                if message.outputs:
                    self._take_outputs(message.outputs)
            elif isinstance(message, wire.Reply):
                future = self._calls.pop(message.call_id, None)
                if future is not None and not future.done():
                    if message.error is None:
                        future.set_result(message.value)
                    else:
                        future.set_exception(RuntimeError(message.error))

    def _take_outputs(self, outputs: StepOutputs) -> None:
        if self._listener is not None:
            self._listener.stepped(outputs)
        result = self._outputs.process(outputs)
        self._abort_in_core(result.abort_ids, "stop")
        for output in result.request_outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[output.request_id]
            stream.put(output)

    def _abort_in_core(self, engine_ids: list[str], reason: str = "abort") -> None:
        if not engine_ids:
            return
        if self._listener is not None:
            self._listener.ended(engine_ids, reason)
        if self._core is not None:
            self._send(self._core, wire.Abort(engine_ids))

    async def _call(self, method: str) -> bool | str | None:
        self._require_core()
        assert self._core is not None
        call_id = next(self._ids)
        future: asyncio.Future[bool | str | None] = self._loop.create_future()
        self._calls[call_id] = future
        try:
            self._send(self._core, wire.Call(call_id, method))
            return await asyncio.wait_for(future, _CALL_SECONDS)
        finally:
            self._calls.pop(call_id, None)

    def _require_core(self) -> None:
        if not self.is_healthy:
            raise EngineDeadError(self.death or "the engine is shut down")

    def _fail_everything(self, error: Exception) -> None:
        for stream in list(self._streams.values()):
            self._streams.pop(stream.request_id, None)
            _, engine_ids = self._outputs.abort(stream.request_id)
            if self._listener is not None:
                self._listener.ended(engine_ids, "error")
            stream.fail(error)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._calls.clear()

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _merge(earlier: RequestOutput, later: RequestOutput) -> None:
    """Add what a delta brings to one that wasn't read."""
    known = {answer.index: answer for answer in earlier.outputs}
    for answer in later.outputs:
        before = known.get(answer.index)
        if before is None:
            earlier.outputs.append(answer)
            continue
        before.text += answer.text
        before.token_ids += answer.token_ids
        if answer.logprobs is not None:
            before.logprobs = (before.logprobs or []) + answer.logprobs
        before.finish_reason, before.stop_reason = answer.finish_reason, answer.stop_reason
        before.cumulative_logprob = answer.cumulative_logprob
    earlier.finished = later.finished
    earlier.prompt_logprobs = later.prompt_logprobs
    earlier.num_cached_tokens = later.num_cached_tokens
    earlier.error = later.error
