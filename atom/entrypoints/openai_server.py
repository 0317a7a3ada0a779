"""`python -m atom.entrypoints.openai_server --model ...`: the HTTP server, as `atom serve`."""

import sys
from collections.abc import Sequence

from atom.entrypoints.commands import serve
from atom.entrypoints.commands.common import run_guarded
from atom.model_engine.arg_utils import FlagParser


def main(argv: Sequence[str] | None = None) -> int:
    def run() -> int:
        parser = FlagParser(
            prog="atom.entrypoints.openai_server",
            usage="python -m atom.entrypoints.openai_server [options]",
            description="Serve a model over HTTP.",
        )
        serve.add_arguments(parser, positional=False)
        return serve.run(parser.parse_args(argv))

    return run_guarded("atom.entrypoints.openai_server", run)


if __name__ == "__main__":
    sys.exit(main())
