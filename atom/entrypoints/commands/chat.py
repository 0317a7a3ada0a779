"""`atom chat`: a conversation on the terminal, or line by line through pipes."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from atom.entrypoints.commands.common import add_flag, add_sampling_flags, make_llm, sampling_params
from atom.utils.errors import RequestError
from atom.utils.strict import did_you_mean

if TYPE_CHECKING:
    from atom.entrypoints.llm import LLM
    from atom.sampling_params import SamplingParams

_COMMANDS = ("/reset", "/system", "/help", "/exit")
_HELP = "/reset forgets the conversation, /system TEXT sets the system prompt and resets, /exit leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from atom.model_engine.arg_utils import EngineArgs

    parser.usage = "atom chat [options]"
    parser.description = f"Talk with a model, one line a turn. {_HELP}."
    add_flag(parser, "system", metavar="TEXT", help="the system prompt")
    add_sampling_flags(parser, without=("n",), temperature=0.7, top_p=0.95)
    EngineArgs.add_cli_args(parser)
    # Each turn repeats the conversation so far, so its cache is worth keeping.
    parser.set_defaults(enable_prefix_caching=True, log_level="warning")


def run(arguments: argparse.Namespace) -> int:
    given = {} if arguments.max_tokens is not None else {"max_tokens": 2**31 - 1}  # as many as there is room for
    params = sampling_params(arguments, **given)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with make_llm(arguments) as llm:
        chat = Chat(llm, params, arguments.system)
        if interactive:
            import readline  # noqa: F401 - gives input() editing and history

            print(f"{arguments.model}: {_HELP}")
        while (line := _read_line(interactive)) is not None:
            if not chat.take(line, interactive):
                break
    return 0


class Chat:
    """The conversation so far; what the model says goes to stdout as it comes."""

    def __init__(self, llm: "LLM", params: "SamplingParams", system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._reset()

    def take(self, line: str, interactive: bool) -> bool:
        """One line of the user; False to leave."""
        text = line.strip()
        if text == "/exit":
            return False
        if text == "/reset":
            self._reset()
        elif text == "/system" or text.startswith("/system "):
            self._system = text.removeprefix("/system").strip() or None
            self._reset()
        elif text == "/help":
            print(_HELP)
        elif text.startswith("/") and " " not in text:
            print(f"unknown command {text!r}{did_you_mean(text, _COMMANDS)}; see /help", file=sys.stderr)
        elif text:
            self._answer(text, interactive)
        return True

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _answer(self, text: str, interactive: bool) -> None:
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for output in self._llm.stream(self._llm.chat_prompt(self._messages), self._params):
                for answer in output.outputs:
                    pieces.append(answer.text)
                    sys.stdout.write(answer.text)
                    sys.stdout.flush()
                if output.error:
                    raise RequestError(output.error)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(" [stopped]", end="")  # the iterator was closed, which aborted the request
        except RequestError as error:
            self._messages.pop()
            if not interactive:
                raise
            print(f"error: {error}; /reset starts over", file=sys.stderr)
            return
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        print(flush=True)


def _read_line(interactive: bool) -> str | None:
    if interactive:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    return sys.stdin.readline() or None
