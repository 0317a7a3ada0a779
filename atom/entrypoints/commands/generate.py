"""`atom generate` and `python -m atom.entrypoint`: answer prompts once and leave."""

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING

from atom.entrypoints.commands.common import EXIT_USER_ERROR, add_flag, add_sampling_flags, make_llm, sampling_params
from atom.utils.errors import RequestError

if TYPE_CHECKING:
    from atom.entrypoints.llm import LLM
    from atom.model_engine.outputs import RequestOutput
    from atom.sampling_params import SamplingParams

DEFAULT_PROMPTS = ["The capital of France is", "Once upon a time", "The three primary colours are"]


def add_arguments(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    from atom.model_engine.arg_utils import EngineArgs

    if positional:
        parser.usage = "atom generate [options] [PROMPT ...]"  # argparse would list two screens of options
        parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to continue; - reads standard input")
    add_flag(parser, "prompt", action="append", metavar="TEXT", help="another prompt; repeatable")
    add_flag(parser, "chat", action="store_true", help="put each prompt through the model's chat template")
    add_flag(parser, "json", action="store_true", help="print one JSON object a prompt")
    add_sampling_flags(parser)
    EngineArgs.add_cli_args(parser)


def run(arguments: argparse.Namespace) -> int:
    prompts = [*getattr(arguments, "prompts", []), *(arguments.prompt or [])] or DEFAULT_PROMPTS
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    params = sampling_params(arguments)
    with make_llm(arguments) as llm:
        inputs = [_chat_prompt(llm, prompt) for prompt in prompts] if arguments.chat else prompts
        started = time.perf_counter()
        if len(prompts) == 1 and params.n == 1 and not arguments.json:
            return _stream(llm, inputs[0], params, started)
        outputs = llm.generate(inputs, params)
        seconds = time.perf_counter() - started
        for prompt, output in zip(prompts, outputs, strict=True):
            _print_json(output) if arguments.json else _print_text(prompt, output)
        _print_rate(sum(len(answer.token_ids) for output in outputs for answer in output.outputs), seconds)
        return EXIT_USER_ERROR if any(output.error for output in outputs) else 0


def _chat_prompt(llm: "LLM", prompt: str) -> "dict[str, object]":
    return llm.chat_prompt([{"role": "user", "content": prompt}])


def _stream(llm: "LLM", prompt: "str | dict[str, object]", params: "SamplingParams", started: float) -> int:
    num_tokens = 0
    for output in llm.stream(prompt, params):
        for answer in output.outputs:
            num_tokens += len(answer.token_ids)
            sys.stdout.write(answer.text)
            sys.stdout.flush()
        if output.error:
            raise RequestError(output.error)
    sys.stdout.write("\n")
    sys.stdout.flush()
    _print_rate(num_tokens, time.perf_counter() - started)
    return 0


def _print_text(prompt: str, output: "RequestOutput") -> None:
    print(f"Prompt: {prompt!r:.200}")
    if output.error:
        print(f"Error: {output.error}")
    for answer in output.outputs:
        print(f"Text: {answer.text!r}")
    print()


def _print_json(output: "RequestOutput") -> None:
    print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))


def _print_rate(num_tokens: int, seconds: float) -> None:
    sys.stdout.flush()
    rate = num_tokens / max(seconds, 1e-9)
    print(f"{num_tokens} tokens in {seconds:.2f} s, {rate:.1f} tokens/s", file=sys.stderr)
