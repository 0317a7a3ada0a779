"""The `atom` command. Builds only the parser of the sub-command that is asked for."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from atom import __version__
from atom.entrypoints.commands.common import run_guarded
from atom.model_engine.arg_utils import FlagParser

_COMMANDS = {
    "generate": "answer prompts once",
    "chat": "talk with a model on the terminal",
    "serve": "serve a model over HTTP, OpenAI-compatible",
    "bench": "measure throughput or latency",
    "config": "print the resolved configuration, its memory plan, and why",
}
# The `atom` command must work on a fresh machine without a hub.
_DEFAULT_MODEL = "smollm2"


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, complete for `command` alone."""
    parser = FlagParser(prog="atom", description="A lightweight LLM inference engine.")
    parser.add_argument("--version", action="version", version=f"atom {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        if name == command:
            importlib.import_module(f"atom.entrypoints.commands.{name}").add_arguments(sub)
            sub.set_defaults(model=_DEFAULT_MODEL)
    return parser


def run(argv: Sequence[str]) -> int:
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    arguments = make_parser(command).parse_args(argv)
    return int(importlib.import_module(f"atom.entrypoints.commands.{arguments.command}").run(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded("atom", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
