"""Runs the server as a program: bind, load, serve, drain, leave."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from atom.entrypoints.commands.common import quick_start
from atom.entrypoints.openai.settings import ServerSettings
from atom.model_engine.core_process import CoreProcess
from atom.utils import startup
from atom.utils.errors import ConfigError
from atom.utils.logging import get_logger

if TYPE_CHECKING:
    from atom.config import Config
    from atom.model_engine.arg_utils import EngineArgs
    from atom.model_engine.async_llm_engine import AsyncLLMEngine
    from atom.model_engine.core_connection import CoreConnection

logger = get_logger(__name__)

EXIT_ENGINE_FAILED = 1
_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that they close them first
_LAST_SECONDS = 3  # after the grace time, for clients to read why their request ended


def run_server(args: "EngineArgs", settings: ServerSettings) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. AtomError for what is wrong with the settings."""
    with _bound(settings) as listener, _ended_by_sigterm(), CoreProcess() as process, contextlib.ExitStack() as stack:
        with quick_start():
            startup.begin(since_process=True)
            with startup.phase("import torch"):
                import torch  # noqa: F401 - to be timed by itself
            with startup.phase("config"):
                config = args.create_config()
            config.asyncio_mode = True
            with startup.phase("import server"):
                from atom.model_engine.core_connection import CoreConnection

                core = CoreConnection(config, process=process)  # it loads the model meanwhile
                stack.callback(core.close, grace=0)
                import uvicorn  # noqa: F401 - modules load while nobody waits for the event loop

                import atom.entrypoints.openai.api_server  # noqa: F401

                loop_factory = _loop_factory()
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_serve(config, core, settings, listener))


async def _serve(config: "Config", core: "CoreConnection", settings: ServerSettings, listener: socket.socket) -> int:
    from atom.entrypoints.openai.api_server import create_app
    from atom.entrypoints.openai.metrics import Metrics
    from atom.model_engine.async_llm_engine import AsyncLLMEngine, EngineDeadError, EngineListener

    stopping = asyncio.Event()
    engine: AsyncLLMEngine | None = None

    def on_signal(number: int) -> None:
        if stopping.is_set():
            logger.warning("second signal: leaving at once")
            os._exit(128 + number)  # the core ends with us
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    metrics = Metrics(settings.served_model_names[0])
    watcher: EngineListener = metrics
    tracing = None
    if settings.otlp_traces_endpoint is not None:
        from atom.entrypoints.openai.tracing import Tracing

        watcher = tracing = Tracing(settings.otlp_traces_endpoint, settings.served_model_names[0], metrics)
    stop = asyncio.ensure_future(stopping.wait())
    start = asyncio.ensure_future(
        AsyncLLMEngine.create(config, core=core, restart=settings.restart_engine, listener=watcher)
    )
    try:
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await start
            return 0
        try:
            engine = start.result()
        except EngineDeadError as error:
            logger.critical("%s", error)
            return EXIT_ENGINE_FAILED
        startup.finish()
        app = create_app(engine, settings, metrics)
        server = _make_server(
            app if tracing is None else tracing.wrap(app), settings, lambda: _announce(settings, listener)
        )
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            logger.info("shutting down: %d open requests get %g s", engine.num_unfinished, settings.shutdown_grace)
            app.gate.draining = True
            server.should_exit = True
            loop.call_later(settings.shutdown_grace, _drop_all, engine)
        await serving
        return 0
    finally:
        stop.cancel()
        if engine is not None:
            await engine.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


def _drop_all(engine: "AsyncLLMEngine") -> None:
    from atom.entrypoints.openai.errors import ApiError

    engine.drop_all(ApiError(503, "the server is shutting down", code="shutting_down"))


def _make_server(app: Any, settings: ServerSettings, on_listening: Callable[[], None]) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_listening()  # not before: whoever reads that line connects at once

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are ours

    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(settings.shutdown_grace) + _LAST_SECONDS,
            ssl_keyfile=settings.ssl_keyfile,
            ssl_certfile=settings.ssl_certfile,
        )
    )


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Until the event loop takes the signal over, it unwinds: what was started ends with the server."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _bound(settings: ServerSettings) -> Iterator[socket.socket]:
    """The server's socket, taken before the model is loaded but not listening yet."""
    if settings.ssl_certfile is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                settings.ssl_certfile, settings.ssl_keyfile
            )
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"ssl_certfile={settings.ssl_certfile!r}, ssl_keyfile: can't be used: {error}") from None
    where = f"server_host={settings.host}, server_port={settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{where}: the host is not known ({error})") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"{where} can't be bound: {os.strerror(error.errno or 0)}") from None
        yield listener


def _announce(settings: ServerSettings, listener: socket.socket) -> None:
    scheme = "https" if settings.ssl_certfile else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logger.info("serving %s on %s://%s:%d", settings.served_model_names[0], scheme, host, listener.getsockname()[1])
    if not settings.api_keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("other machines can reach this server, and no --api-key is set")


def _loop_factory() -> Any | None:
    """uvloop's where there is one (not on Windows)."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
