"""`atom serve` and `python -m atom.entrypoints.openai_server`: an OpenAI-compatible HTTP server."""

import argparse


def add_arguments(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    from atom.entrypoints.openai.settings import add_server_flags
    from atom.model_engine.arg_utils import EngineArgs

    if positional:
        parser.usage = "atom serve [options] [MODEL]"
        parser.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    add_server_flags(parser)
    EngineArgs.add_cli_args(parser)


def run(arguments: argparse.Namespace) -> int:
    from atom.entrypoints.openai.settings import ServerSettings
    from atom.model_engine.arg_utils import EngineArgs

    if getattr(arguments, "model_name", None):
        arguments.model = arguments.model_name
    settings = ServerSettings.from_cli_args(arguments)
    from atom.entrypoints.openai.launcher import run_server

    return run_server(EngineArgs.from_cli_args(arguments), settings)
