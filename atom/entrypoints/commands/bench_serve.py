"""`atom bench serve`: load for any OpenAI-compatible server, and what its users would feel. Starts no engine."""

import argparse
import asyncio
import dataclasses
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atom.entrypoints.commands.common import EXIT_INTERRUPTED, EXIT_USER_ERROR, add_flag
from atom.utils.errors import ConfigError

if TYPE_CHECKING:
    from atom.entrypoints.bench_serve.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [options]"

    def flag(name: str, text: str, default: Any = None, kind: Any = str, **options: Any) -> None:
        shown = text if default is None else f"{text} (default: {default})"
        metavar = "N" if kind in (int, float, _rate) else "X"
        add_flag(group, name, type=kind, default=default, metavar=metavar, help=shown, **options)

    def switch(name: str, text: str) -> None:
        add_flag(group, name, action="store_true", help=text)

    def choice(name: str, text: str, *values: str) -> None:
        add_flag(group, name, choices=values, default=values[0], help=f"{text} (default: {values[0]})")

    group = parser.add_argument_group("server")
    flag("base_url", "where it is", "http://127.0.0.1:8000")
    flag("endpoint", "/v1/completions or /v1/chat/completions", "/v1/completions")
    flag("model", "name in the requests (default: the first of /v1/models)")
    flag("api_key", "sent as a bearer token")
    add_flag(group, "header", action="append", default=[], metavar="NAME=VALUE", help="sent with requests; repeatable")
    flag("timeout", "seconds a request may take", 3600.0, float)
    flag("connect_timeout", "seconds a connection may take", 30.0, float)
    flag("ca_file", "PEM file of certificates to trust for https")
    switch("insecure", "don't check the server's certificate")

    group = parser.add_argument_group("workload")
    choice("dataset", "what is asked", "random", "sharegpt", "prefix")
    flag("dataset_path", "JSON file of conversations, for sharegpt")
    flag("num_prompts", "requests of each point", 200, int)
    flag("input_len", "tokens of a prompt; for prefix, after the prefix", 128, int)
    flag("output_len", "most tokens of an answer (default: 128; for sharegpt, those of the file's)", None, int)
    flag("range_ratio", "lengths vary by this share, up and down", 0.0, float)
    flag("num_prefixes", "shared beginnings, for prefix", 4, int)
    flag("prefix_len", "tokens of a shared beginning", 256, int)
    flag("max_total_len", "leave longer conversations of sharegpt out", 2048, int)
    choice("prompt_type", "token ids or words; auto is ids where the server takes them", "auto", "ids", "words")
    flag("vocab_size", "token ids are below it", 32000, int)
    flag("temperature", "sampling temperature (default: the server's)", None, float)
    switch("ignore_eos", "answers always have their full length; not every server can")
    flag("seed", "of prompts and arrivals", 0, int)

    group = parser.add_argument_group("load; each combination of rates and concurrencies is one row")
    flag("request_rate", "requests a second, or inf; several make a sweep (default: inf)", None, _rate, nargs="+")
    flag("burstiness", "1 = Poisson arrivals, less = bursts, more = even", 1.0, float)
    flag("max_concurrency", "most requests at once; several make a sweep (default: no limit)", None, int, nargs="+")
    flag("warmup", "requests before measuring", 1, int)
    switch("reset_prefix_cache", "empty the server's prefix cache before each row")

    group = parser.add_argument_group("results")
    flag("goodput", "objectives in ms, e.g. ttft:200 tpot:50 e2el:5000", None, nargs="+")
    flag("json", "write all results to this file")
    flag("plot", "draw the sweep to this PNG file")
    switch("save_detailed", "each request's times in the JSON file, too")
    parser.set_defaults(model=None)


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from atom.entrypoints.bench_serve import plot, report
    from atom.entrypoints.bench_serve.session import Session
    from atom.entrypoints.bench_serve.settings import BenchSettings

    values = vars(arguments) | {
        "headers": dict(_header(text) for text in arguments.header),
        "request_rate": arguments.request_rate or [math.inf],
        "max_concurrency": arguments.max_concurrency or [None],
        "goodput": arguments.goodput or [],
    }
    settings = BenchSettings(**{f.name: values[f.name] for f in dataclasses.fields(BenchSettings)})
    if settings.plot:
        plot.check_available()
    for name in ("json", "plot"):
        path = getattr(settings, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{name}={path!r}: its folder does not exist")
    # Piped, a table's width is its own, not that of a terminal that isn't there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    session = Session(settings, lambda point: report.print_point(console, point, settings.objectives))
    _raise_open_files_limit()
    _run_until_interrupted(session)
    results = session.results
    if len(results.points) > 1:
        report.print_sweep(console, results.points)
    if results.interrupted:
        print(f"interrupted; {results.unfinished} requests of the last row are not in it", file=sys.stderr)
    try:
        if settings.json:
            report.write_json(settings.json, settings, results)
        if settings.plot and results.points:
            plot.write_plot(settings.plot, results.points, f"{results.model}: {settings.dataset}, {settings.base_url}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the results could not be written: {error}") from None
    if results.interrupted:
        return EXIT_INTERRUPTED
    return 0 if any(point.ok for point in results.points) else EXIT_USER_ERROR


def _run_until_interrupted(session: "Session") -> None:
    """The first Ctrl-C ends the benchmark with what it has; a second one ends the program."""
    try:
        import uvloop

        factory: Any = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop

    async def run() -> None:
        task = asyncio.ensure_future(session.run())

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            task.cancel()

        loop = asyncio.get_running_loop()
        if sys.platform != "win32":
            loop.add_signal_handler(signal.SIGINT, interrupt)
        await task

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())


def _raise_open_files_limit() -> None:
    """Each open request is a socket."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _rate(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"header={text!r} must be NAME=VALUE")
    return name.strip(), value.strip()
