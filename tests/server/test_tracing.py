"""Spans of requests, as a collector gets them over HTTP."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from live import live_server
from tiny_models import make_checkpoint

from atom.entrypoints.openai.settings import ServerSettings
from atom.utils.errors import ConfigError

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not installed
    with pytest.raises(ConfigError) as caught:
        ServerSettings(served_model_names=["m"], otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
    assert "atom-inference[otel]" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="otlp_traces_endpoint='localhost:4318' must be a URL"):
        ServerSettings(served_model_names=["m"], otlp_traces_endpoint="localhost:4318")


@pytest.fixture
def collector():
    """(URL, the spans it got)"""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs atom-inference[otel]")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(
                (resource.resource, span)
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1/traces", spans
        http.shutdown()
        thread.join()


def values_of(attributes):
    def value(any_value):
        kind = any_value.WhichOneof("value")
        inner = getattr(any_value, kind)
        return [value(item) for item in inner.values] if kind == "array_value" else inner

    return {attribute.key: value(attribute.value) for attribute in attributes}


def test_a_span_for_each_prompt(tmp_path, collector):
    url, spans = collector
    model = str(make_checkpoint("llama", tmp_path / "model"))
    flags = ["--load_dummy", "--max-model-len", "256", "--served-model-name", "tiny", "--otlp-traces-endpoint", url]
    with live_server(tmp_path, *flags, model=model) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0.5, "top_p": 0.75, "ignore_eos": True}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert client.post("/v1/completions", json=body | {"n": 2}, headers={"traceparent": "no"}).status_code == 200
        with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 250, "stream": True}) as response:
            next(response.iter_lines())
        assert client.post("/v1/completions", json=body | {"top_p": 5}).status_code == 400
    assert server.process.returncode == 0
    assert len(spans) == 3  # sent before the server ended
    assert {values_of(resource.attributes)["service.name"] for resource, _ in spans} == {"atom"}
    (alone,) = [span for _, span in spans if span.trace_id.hex() == TRACE]
    assert alone.name == "llm_request"
    assert alone.parent_span_id.hex() == PARENT
    attributes = values_of(alone.attributes)
    assert "mine" in attributes["gen_ai.request.id"]
    seconds = (alone.end_time_unix_nano - alone.start_time_unix_nano) / 1e9
    first, whole = (attributes[f"gen_ai.latency.{name}"] for name in ("time_to_first_token", "e2e"))
    assert 0 < first <= whole == pytest.approx(seconds, abs=0.05)
    expected = {
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.n": 1,
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert attributes | expected == attributes
    others = sorted(
        (values_of(span.attributes) for _, span in spans if span is not alone), key=lambda a: a["gen_ai.request.n"]
    )
    assert others[0]["gen_ai.response.finish_reasons"] == ["abort"]
    assert others[1]["gen_ai.usage.completion_tokens"] == 8
    assert not any(span.parent_span_id for _, span in spans if span is not alone)
