"""What the server itself can be told; every field is a flag of `atom serve`."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from atom.entrypoints.commands.common import add_flag
from atom.entrypoints.openai.parsers import REASONING_PARSERS, TOOL_PARSERS
from atom.entrypoints.openai.parsers.registry import require_known
from atom.utils.errors import ConfigError


@dataclass(kw_only=True)
class ServerSettings:
    """served_model_names: what requests may call the model; the first is the one answers carry.

    chat_template: a template, or a file with one, which is read here. ConfigError for values that can't be.
    """

    served_model_names: list[str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: list[str] = field(default_factory=list)
    cors_origins: list[str] = field(default_factory=list)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    max_request_bytes: int = 8 * 2**20
    max_queue: int = 4096
    request_timeout: float | None = None
    read_timeout: float = 60.0
    shutdown_grace: float = 30.0
    restart_engine: bool = False
    chat_template: str | None = None
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    log_requests: bool = False
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server_port={self.port} must be between 0 and 65535 (0 = any that is free)")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile must be given together")
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("api_key is empty; give a key, or leave the flag out to serve everybody")
        for name, low in (("max_request_bytes", 1), ("max_queue", 0), ("shutdown_grace", 0), ("read_timeout", 1)):
            if not getattr(self, name) >= low:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {low}")
        for flag, known in (("reasoning_parser", REASONING_PARSERS), ("tool_call_parser", TOOL_PARSERS)):
            if getattr(self, flag) is not None:
                require_known(flag, known, getattr(self, flag))
        if self.chat_template is not None:
            self.chat_template = _read_template(self.chat_template)
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(f"request_timeout={self.request_timeout} must be above 0 seconds")
        if self.otlp_traces_endpoint is not None:
            _check_tracing(self.otlp_traces_endpoint)

    @classmethod
    def from_cli_args(cls, arguments: argparse.Namespace) -> "ServerSettings":
        names = [name for group in arguments.served_model_name or [] for name in group]
        return cls(
            served_model_names=names or [arguments.model],
            host=arguments.server_host,
            port=arguments.server_port,
            api_keys=arguments.api_key or [],
            cors_origins=[o for group in arguments.cors_origins or [] for o in group],
            **{name: getattr(arguments, name) for name in _PLAIN},
        )


_PLAIN = (
    "ssl_keyfile", "ssl_certfile", "max_request_bytes", "max_queue", "request_timeout", "read_timeout",
    "shutdown_grace", "restart_engine", "chat_template", "reasoning_parser", "tool_call_parser", "log_requests",
    "otlp_traces_endpoint",
)  # fmt: skip


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")

    def flag(name: str, kind: type, default: object, help: str) -> None:
        text = help if default is None else f"{help} (default: {default})"
        add_flag(group, name, type=kind, default=default, metavar="N" if kind in (int, float) else "X", help=text)

    def several(name: str, help: str) -> None:
        add_flag(group, name, action="append", nargs="+", metavar="X", help=help)

    flag("server_host", str, "127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    flag("server_port", int, 8000, "HTTP port; 0 takes any that is free")
    several("served_model_name", "names requests may use for the model, instead of --model's")
    add_flag(group, "api_key", action="append", metavar="KEY", help="require this key of clients; repeatable")
    several("cors_origins", "web origins that may call the API; * = all")
    flag("ssl_keyfile", str, None, "private key for HTTPS")
    flag("ssl_certfile", str, None, "certificate chain for HTTPS")
    flag("max_request_bytes", int, 8 * 2**20, "larger bodies are refused with 413")
    flag("max_queue", int, 4096, "requests that may wait for their turn; more are refused with 429")
    flag("request_timeout", float, None, "seconds a request may take in all")
    flag("read_timeout", float, 60.0, "seconds a client may take to send its body, or not read its answer")
    flag("shutdown_grace", float, 30.0, "seconds that open requests get after SIGTERM")
    add_flag(group, "restart_engine", action="store_true", help="start the engine core again should it die")
    flag("chat_template", str, None, "Jinja template, or a file with one, instead of the model's")
    flag("reasoning_parser", str, None, "splits reasoning from answers, e.g. qwen3 or deepseek_r1")
    flag("tool_call_parser", str, None, "reads tool calls, e.g. hermes, llama3, mistral or deepseek")
    add_flag(group, "log_requests", action="store_true", help="one log line for each request")
    flag("otlp_traces_endpoint", str, None, "URL of an OpenTelemetry collector, e.g. http://localhost:4318/v1/traces")


def _check_tracing(endpoint: str) -> None:
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"otlp_traces_endpoint={endpoint!r} must be a URL, e.g. http://localhost:4318/v1/traces")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r} needs OpenTelemetry: pip install 'atom-inference[otel]' ({error})"
        ) from None


def _read_template(given: str) -> str:
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template={given!r} is neither a template nor a file that can be read: {error}"
        ) from None
