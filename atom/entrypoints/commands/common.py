"""What the command lines share: sampling flags, starting an LLM, and how errors end a program."""

import argparse
import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from atom.utils import startup
from atom.utils.errors import AtomError

if TYPE_CHECKING:
    from atom.entrypoints.llm import LLM
    from atom.sampling_params import SamplingParams

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# Flag -> (type, help). Their names are those of SamplingParams; unset ones keep its defaults.
_SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "generate at most this many tokens"),
    "temperature": (float, "0 = greedy; lower is more deterministic"),
    "top_p": (float, "sample from the smallest set of tokens with this much probability"),
    "top_k": (int, "sample from the k most likely tokens; 0 = all"),
    "min_p": (float, "drop tokens less likely than this share of the likeliest"),
    "presence_penalty": (float, "-2 to 2, on tokens that have occurred in the answer"),
    "frequency_penalty": (float, "-2 to 2, times how often a token has occurred in the answer"),
    "repetition_penalty": (float, "above 0, on tokens that have occurred at all; 1 = off"),
    "min_tokens": (int, "no end before that many tokens"),
    "n": (int, "answers a prompt"),
}


def add_flag(parser: argparse._ActionsContainer, name: str, **options: Any) -> None:
    """A long flag, shown with - and accepted with _ too; `name` is that of its attribute."""
    spellings = dict.fromkeys(["--" + name.replace("_", "-"), "--" + name])
    action = parser.add_argument(*spellings, dest=name, **options)
    action.option_strings = [s for s in action.option_strings if "_" not in s]


def add_sampling_flags(parser: argparse.ArgumentParser, without: Sequence[str] = (), **defaults: object) -> None:
    """`defaults` replace those of SamplingParams for this command. The engine's --seed seeds requests too."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING_FLAGS.items():
        if name in without:
            continue
        default = defaults.get(name)
        shown = text if default is None else f"{text} (default: {default})"
        add_flag(group, name, type=kind, default=default, metavar=kind.__name__.upper(), help=shown)
    add_flag(group, "ignore_eos", action="store_true", help="go on past the model's end token")
    add_flag(group, "stop", action="append", metavar="TEXT", help="end before this text; repeatable")


def sampling_params(arguments: argparse.Namespace, **fixed: Any) -> "SamplingParams":
    from atom.sampling_params import SamplingParams

    given: dict[str, Any] = {name: getattr(arguments, name, None) for name in _SAMPLING_FLAGS}
    given |= {"ignore_eos": arguments.ignore_eos, "stop_strings": arguments.stop} | fixed
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def make_llm(arguments: argparse.Namespace) -> "LLM":
    """An LLM from the flags of EngineArgs; with --torch-profiler-dir it is profiled until it is closed."""
    with quick_start(), startup.measured(since_process=True):
        with startup.phase("import torch"):
            import torch  # noqa: F401 - to be timed by itself
        with startup.phase("import atom"):
            from atom.entrypoints.llm import LLM
            from atom.model_engine.arg_utils import EngineArgs
            from atom.model_engine.llm_engine import LLMEngine
        with startup.phase("config"):
            config = EngineArgs.from_cli_args(arguments).create_config()
        llm = LLM.from_engine(LLMEngine(config))
    if llm.engine.config.torch_profiler_dir:
        llm.start_profile()
    return llm


@contextmanager
def quick_start() -> Iterator[None]:
    """Import and load without garbage collection, which takes a fifth of the time to a first token.

    What then exists stays for good, so later collections needn't look at it.
    """
    gc.disable()
    try:
        with _signals_raised_again():
            yield
    finally:
        gc.freeze()
        # Frozen objects would outlive the interpreter's last collection, and extension modules complain of leaks.
        atexit.register(gc.unfreeze)
        gc.enable()


@contextmanager
def _signals_raised_again() -> Iterator[None]:
    """A signal whose handler raises ends this block at its end at the latest.

    Modules that are being imported swallow exceptions, where they look whether another module can be used.
    """
    came: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handlers[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, note)
    try:
        yield
    finally:
        for known, handler in handlers.items():
            signal.signal(known, handler)
    if came:
        handlers[came[0]](came[0], None)


def run_guarded(program: str, call: Callable[[], int]) -> int:
    """The exit code of a program: one line for a user's mistake, none for Ctrl-C or a closed pipe."""
    try:
        code = call()
        sys.stdout.flush()
        return code
    except AtomError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
