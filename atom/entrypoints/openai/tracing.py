"""OpenTelemetry: a span for each prompt that is answered, under vLLM's attribute names, sent to a collector over HTTP.

Needs the packages of `atom-inference[otel]`; nothing else imports them.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atom import __version__
from atom.entrypoints.openai.middleware import Receive, Scope, Send
from atom.model_engine.async_llm_engine import EngineListener
from atom.model_engine.protocol import EngineRequest, StepOutputs

_EXPORT_SECONDS = 2.0  # a collector that doesn't answer must not hold up the server's end


@dataclass(slots=True)
class _Open:
    """A span whose answers have not all ended. Times are of time.monotonic()."""

    span: Any
    num_running: int
    finish_reasons: list[str]
    arrival: float
    first: float = 0.0
    num_tokens: int = 0


class Tracing:
    """Listens to an engine, and passes on what it hears to `listener`.

    endpoint: where the collector takes traces, usually http://HOST:4318/v1/traces.
    """

    def __init__(self, endpoint: str, model_name: str, listener: EngineListener) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "atom"}))
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS))
        )
        self._tracer = self._provider.get_tracer("atom", __version__)
        self._model_name = model_name
        self._listener = listener
        self._open: dict[str, _Open] = {}  # by the engine's request id

    def wrap(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> Any:
        """The ASGI application, its spans being children of the one that a request's `traceparent` names."""
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        extract = TraceContextTextMapPropagator().extract

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            token = context.attach(extract(headers))
            try:
                await app(scope, receive, send)
            finally:
                context.detach(token)

        return traced

    def close(self) -> None:
        """Send what has ended; blocks for a few seconds at most."""
        self._provider.shutdown()

    # -- EngineListener --

    def submitted(self, requests: Sequence[EngineRequest]) -> None:
        """One prompt's engine requests: called in the task that serves it, which knows the parent span."""
        from opentelemetry.trace import SpanKind

        self._listener.submitted(requests)
        first, params = requests[0], requests[0].sampling_params
        attributes = {
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": first.request_id if len(requests) == 1 else first.request_id.removesuffix("_0"),
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.n": len(requests),
            "gen_ai.usage.prompt_tokens": len(first.prompt_token_ids),
        }
        span = self._tracer.start_span("llm_request", kind=SpanKind.SERVER, attributes=attributes)
        entry = _Open(span, len(requests), [], time.monotonic())
        self._open.update((request.request_id, entry) for request in requests)

    def stepped(self, outputs: StepOutputs) -> None:
        self._listener.stepped(outputs)
        for output in outputs:
            entry = self._open.get(output.request_id)
            if entry is None:
                continue
            if output.new_token_ids:
                entry.first = entry.first or time.monotonic()
                entry.num_tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._end(output.request_id, output.finish_reason)

    def ended(self, request_ids: Sequence[str], reason: str) -> None:
        self._listener.ended(request_ids, reason)
        for request_id in request_ids:
            if request_id in self._open:
                self._end(request_id, reason)

    def _end(self, request_id: str, reason: str) -> None:
        from opentelemetry.trace import StatusCode

        entry = self._open.pop(request_id)
        entry.finish_reasons.append(reason)
        entry.num_running -= 1
        if entry.num_running:
            return
        span = entry.span
        span.set_attribute("gen_ai.usage.completion_tokens", entry.num_tokens)
        span.set_attribute("gen_ai.response.finish_reasons", entry.finish_reasons)
        if entry.first:
            span.set_attribute("gen_ai.latency.time_to_first_token", entry.first - entry.arrival)
        span.set_attribute("gen_ai.latency.e2e", time.monotonic() - entry.arrival)
        if "error" in entry.finish_reasons:
            span.set_status(StatusCode.ERROR)
        span.end()
