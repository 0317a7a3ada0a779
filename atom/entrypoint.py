"""`python -m atom.entrypoint --model ...`: generate for some prompts with the given engine settings."""

import sys
from collections.abc import Sequence

from atom.entrypoints.commands import generate
from atom.entrypoints.commands.common import run_guarded
from atom.model_engine.arg_utils import FlagParser


def main(argv: Sequence[str] | None = None) -> int:
    def run() -> int:
        parser = FlagParser(
            prog="atom.entrypoint",
            usage="python -m atom.entrypoint [options]",
            description="Generate for some prompts.",
        )
        generate.add_arguments(parser, positional=False)
        return generate.run(parser.parse_args(argv))

    return run_guarded("atom.entrypoint", run)


if __name__ == "__main__":
    sys.exit(main())
