"""The application: which path does what. `create_app` makes it around an engine that runs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRouter

from atom import __version__
from atom.entrypoints.openai import serving_messages, serving_responses
from atom.entrypoints.openai import tokenize as tokenization
from atom.entrypoints.openai.context import ServingContext
from atom.entrypoints.openai.errors import ApiError, add_error_handlers
from atom.entrypoints.openai.metrics import Metrics, StatisticsLine
from atom.entrypoints.openai.middleware import Gate
from atom.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from atom.entrypoints.openai.routing import ERRORS, JsonRoute, answer
from atom.entrypoints.openai.serving_chat import ChatCompletions, ChatService
from atom.entrypoints.openai.serving_completion import CompletionService
from atom.entrypoints.openai.serving_models import ModelList
from atom.entrypoints.openai.settings import ServerSettings
from atom.entrypoints.openai.streaming import EventStream
from atom.entrypoints.openai.ui import mount_ui
from atom.model_engine.async_llm_engine import AsyncLLMEngine
from atom.utils.logging import get_logger

logger = get_logger(__name__)

_STATISTICS_SECONDS = 10.0
_STALL_CHECK_SECONDS = 2.0
_PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Application(FastAPI):
    """FastAPI behind the gate. `state.context` is the ServingContext, `state.chat` the ChatService."""

    def __init__(self, context: ServingContext, **options: Any) -> None:
        super().__init__(**options)
        self.gate = Gate(super().__call__, context.settings)
        self.state.context = context

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.gate(scope, receive, send)


def create_app(engine: AsyncLLMEngine, settings: ServerSettings, metrics: Metrics) -> Application:
    """The ASGI application. The engine stays its caller's, to close after the application has ended."""
    context = ServingContext(engine, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_log_statistics(context)), asyncio.create_task(_drop_stalled(context))]
        yield
        for task in tasks:
            task.cancel()

    app = Application(
        context,
        title="ATOM",
        version=__version__,
        description="OpenAI-compatible API of the ATOM inference engine.",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    add_error_handlers(app)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    chat = ChatService(context)
    app.state.chat = chat
    app.include_router(_openai_routes(context, chat))
    app.include_router(_engine_routes(context))
    serving_responses.mount(app)
    serving_messages.mount(app)
    mount_ui(app)
    return app


def _openai_routes(context: ServingContext, chat: ChatService) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, responses=ERRORS)
    completions = CompletionService(context)
    chats = ChatCompletions(chat)
    models = ModelList(context)

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        prepared = await completions.prepare(body, http)
        if body.stream:
            return EventStream(completions.stream(prepared), context.streams, prepared.close)
        return await answer(http, completions.complete(prepared), prepared.close)

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, http: Request) -> Response:
        prepared = await chats.service.prepare(body, http)
        if body.stream:
            return EventStream(chats.stream(prepared), context.streams, prepared.close)
        return await answer(http, chats.complete(prepared), prepared.close)

    @router.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(models.all())

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        return JSONResponse(models.one(model))

    @router.post("/v1/embeddings")
    async def create_embedding(body: EmbeddingRequest) -> Response:
        name = context.check_model(body.model)
        raise ApiError(
            400, f"the model {name!r} generates text and makes no embeddings", param="model", code="unsupported"
        )

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSONResponse(await tokenization.tokenize(context, chat.template, body))

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        return JSONResponse(await tokenization.detokenize(context, body))

    return router


def _engine_routes(context: ServingContext) -> APIRouter:
    router = APIRouter(responses=ERRORS)
    engine, metrics = context.engine, context.metrics

    @router.get("/health")
    @router.get("/ping", include_in_schema=False)
    async def health(http: Request) -> Response:
        """200 while requests are served; 503 without an engine core, or while shutting down."""
        if http.app.gate.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if not engine.is_healthy:
            raise ApiError(503, engine.death or "the engine is shut down", code="engine_dead")
        return JSONResponse({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @router.get("/metrics")
    async def read_metrics() -> Response:
        metrics.stats = context.current_stats()
        return Response(metrics.exposition(), media_type=_PROMETHEUS_TYPE)

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        context.require_engine()
        if not await engine.reset_prefix_cache():
            raise ApiError(409, "the prefix cache can't be reset while requests run", code="busy")
        return JSONResponse({"status": "ok"})

    @router.post("/start_profile")
    async def start_profile() -> Response:
        context.require_engine()
        await engine.start_profile()
        return JSONResponse({"status": "ok"})

    @router.post("/stop_profile")
    async def stop_profile() -> Response:
        context.require_engine()
        path = await engine.stop_profile()
        if path is None:
            raise ApiError(409, "no profile is being taken", code="not_profiling")
        return JSONResponse({"status": "ok", "trace": path})

    return router


async def _log_statistics(context: ServingContext) -> None:
    line = StatisticsLine(context.metrics)
    while True:
        await asyncio.sleep(_STATISTICS_SECONDS)
        text = line.next(context.current_stats())
        if text:
            logger.info("%s", text)


async def _drop_stalled(context: ServingContext) -> None:
    while True:
        await asyncio.sleep(_STALL_CHECK_SECONDS)
        context.streams.drop_stalled(context.settings.read_timeout)
