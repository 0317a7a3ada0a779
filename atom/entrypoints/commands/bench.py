"""`atom bench throughput|latency`: random prompts, greedy, end tokens ignored; the last line is JSON.

`atom bench serve`, which measures a server over HTTP, has its own module.
"""

import argparse
import json
import random
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from atom.entrypoints.commands import bench_serve
from atom.entrypoints.commands.common import add_flag, make_llm
from atom.utils.errors import ConfigError

if TYPE_CHECKING:
    from atom.entrypoints.llm import LLM
    from atom.model_engine.outputs import RequestOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from atom.model_engine.arg_utils import EngineArgs

    kinds = parser.add_subparsers(dest="kind", required=True, metavar="throughput|latency|serve")
    throughput = kinds.add_parser("throughput", help="many requests at once: tokens a second")
    add_flag(throughput, "num_prompts", type=int, default=64, metavar="N", help="requests (default: 64)")
    latency = kinds.add_parser("latency", help="one batch: time to the first and between tokens")
    add_flag(latency, "batch_size", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    bench_serve.add_arguments(kinds.add_parser("serve", help="any OpenAI-compatible server under load"))
    for kind, input_len, output_len in ((throughput, "16-128", 64), (latency, "32", 128)):
        kind.usage = f"{kind.prog} [options]"
        length = f"tokens of a prompt, N or FROM-TO (default: {input_len})"
        add_flag(kind, "input_len", default=input_len, metavar="N", help=length)
        text = f"tokens of an answer (default: {output_len})"
        add_flag(kind, "output_len", type=int, default=output_len, metavar="N", help=text)
        add_flag(kind, "repeat", type=int, default=3, metavar="N", help="measured runs after a warm-up (default: 3)")
        EngineArgs.add_cli_args(kind)
        kind.set_defaults(model="smollm2")


def run(arguments: argparse.Namespace) -> int:
    if arguments.kind == "serve":
        return bench_serve.run(arguments)
    count = arguments.num_prompts if arguments.kind == "throughput" else arguments.batch_size
    for name, value in (("requests", count), ("repeat", arguments.repeat), ("output_len", arguments.output_len)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    low, high = _length_range(arguments.input_len)
    with make_llm(arguments) as llm:
        vocab_size = llm.engine.input_processor.vocab_size
        source = random.Random(arguments.seed)
        prompts = [[source.randrange(vocab_size) for _ in range(source.randint(low, high))] for _ in range(count)]
        _measure(llm, prompts[: min(count, 4)], min(arguments.output_len, 8))  # warm-up
        runs = []
        for i in range(arguments.repeat):
            seconds, outputs = _measure(llm, prompts, arguments.output_len)
            runs.append(_throughput(seconds, outputs) if arguments.kind == "throughput" else _latency(seconds, outputs))
            print(f"run {i + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[-1].items()), file=sys.stderr)
        print(json.dumps(_report(arguments, llm, prompts, runs)))
    return 0


def _measure(llm: "LLM", prompts: list[list[int]], output_len: int) -> "tuple[float, list[RequestOutput]]":
    from atom.sampling_params import SamplingParams

    llm.reset_prefix_cache()  # or every run after the first would find its prompts there
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    for output in outputs:
        if output.error:
            raise ConfigError(f"input_len: {output.error}")
    return seconds, outputs


def _throughput(seconds: float, outputs: "list[RequestOutput]") -> dict[str, float]:
    num_output = sum(len(o.outputs[0].token_ids) for o in outputs)
    num_prompt = sum(len(o.prompt_token_ids) for o in outputs)
    return {
        "output_tokens_per_s": num_output / seconds,
        "total_tokens_per_s": (num_prompt + num_output) / seconds,
        "requests_per_s": len(outputs) / seconds,
        "seconds": seconds,
    }


def _latency(seconds: float, outputs: "list[RequestOutput]") -> dict[str, float]:
    """Medians over the batch."""
    values = {"seconds": seconds, "output_tokens_per_s": sum(len(o.outputs[0].token_ids) for o in outputs) / seconds}
    for name in ("ttft", "tpot"):
        times = [t for o in outputs if o.metrics is not None and (t := getattr(o.metrics, name)) is not None]
        if times:
            values[f"{name}_s"] = statistics.median(times)
    return values


def _report(
    arguments: argparse.Namespace, llm: "LLM", prompts: list[list[int]], runs: list[dict[str, float]]
) -> dict[str, Any]:
    """Medians over the runs, each with its least and greatest value."""
    config = llm.engine.config
    report: dict[str, Any] = {
        "benchmark": arguments.kind,
        "model": config.model,
        "dtype": str(config.torch_dtype).removeprefix("torch."),
        "kv_cache_dtype": config.kv_cache_dtype,
        "num_requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_len": arguments.output_len,
        "runs": len(runs),
    }
    for name in runs[0]:
        values = [run[name] for run in runs]
        report[name] = round(statistics.median(values), 6)
        report[f"{name}_range"] = [round(min(values), 6), round(max(values), 6)]
    return report


def _length_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = (0, 0)
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"input_len={text!r} must be a positive number or a range such as 16-128")
    return bounds
