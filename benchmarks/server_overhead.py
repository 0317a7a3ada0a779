"""How much of the engine's offline throughput `atom serve` keeps when it is saturated; the goal is 95%.

    python benchmarks/server_overhead.py [--rounds 3] [--num-prompts 128] [engine flags, such as --max-num-seqs 64]

A round runs the same prompts of random token ids twice, each time in fresh processes with the same engine flags:
by LLM.generate in one process, and through `atom serve`, sent all at once by `atom bench serve`, which shares the
machine. Greedy, end tokens ignored. The order alternates from round to round, as machines get slower when they get
warm. The last line is JSON; the exit code is 1 below the goal.
Keep the machine otherwise idle.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atom.entrypoints.bench_serve.workload import random_prompts
from atom.model_engine.arg_utils import EngineArgs, FlagParser

GOAL = 0.95
START_SECONDS = 300
NUM_WARMUP = 8
RESULT_MARK = "offline result: "


def make_parser() -> argparse.ArgumentParser:
    parser = FlagParser(description=__doc__.splitlines()[0], usage="%(prog)s [options] [engine flags]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=32000, help="token ids are below it (default: 32000)")
    parser.add_argument("--offline-worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def run_offline_worker(arguments: argparse.Namespace, engine_flags: list[str]) -> None:
    """Measures LLM.generate in this process and prints output tokens a second."""
    from atom import SamplingParams
    from atom.entrypoints.commands.common import make_llm

    parser = FlagParser()
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model="smollm2")
    with make_llm(parser.parse_args(engine_flags)) as llm:

        def measure(count: int, seed: int) -> float:
            prompts = random_prompts(
                count,
                input_len=arguments.input_len,
                output_len=arguments.output_len,
                vocab_size=arguments.vocab_size,
                seed=seed,
            )
            params = SamplingParams(temperature=0, max_tokens=arguments.output_len, ignore_eos=True)
            started = time.perf_counter()
            outputs = llm.generate([prompt.prompt for prompt in prompts], params, use_tqdm=False)
            seconds = time.perf_counter() - started
            errors = {output.error for output in outputs if output.error}
            if errors:
                raise SystemExit(f"offline: {errors}")
            return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds

        measure(NUM_WARMUP, seed=-1)
        print(RESULT_MARK + json.dumps(measure(arguments.num_prompts, seed=0)))


def measure_offline() -> float:
    """Output tokens a second, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--offline-worker"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in result.stdout.splitlines() if line.startswith(RESULT_MARK))
    return float(json.loads(line.removeprefix(RESULT_MARK)))


def measure_server(arguments: argparse.Namespace, engine_flags: list[str], folder: Path) -> float:
    """Output tokens a second, through HTTP."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "atom.entrypoints.openai_server", "--server-port", "0"]
    if "--model" not in engine_flags:
        command += ["--model", "smollm2"]
    with log.open("wb") as file:
        server = subprocess.Popen([*command, *engine_flags], stdout=file, stderr=file)
    try:
        url = wait_until_serving(server, log)
        report = folder / "report.json"
        flags = {
            "base-url": url,
            "num-prompts": arguments.num_prompts,
            "input-len": arguments.input_len,
            "output-len": arguments.output_len,
            "vocab-size": arguments.vocab_size,
            "prompt-type": "ids",
            "temperature": 0,
            "warmup": NUM_WARMUP,
            "json": report,
        }
        bench = [sys.executable, "-m", "atom.entrypoints.cli", "bench", "serve", "--ignore-eos"]
        bench += [f"--{name}={value}" for name, value in flags.items()]
        subprocess.run(bench, check=True, stdout=subprocess.DEVNULL)
        (point,) = json.loads(report.read_text())["points"]
        if point["failed"]:
            raise SystemExit(f"requests failed: {point['failures']}")
        return float(point["output_tokens_per_s"])
    finally:
        server.send_signal(signal.SIGINT if sys.platform == "win32" else signal.SIGTERM)
        server.wait(60)


def wait_until_serving(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"serving \S+ on (https?://\S+)", log.read_text(errors="replace"))
        if found:
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')}")


def main() -> int:
    arguments, engine_flags = parse()
    if arguments.offline_worker:
        run_offline_worker(arguments, engine_flags)
        return 0
    offline: list[float] = []
    server: list[float] = []
    for index in range(arguments.rounds):
        for kind in ("offline", "server") if index % 2 == 0 else ("server", "offline"):
            if kind == "offline":
                offline.append(measure_offline())
            else:
                with tempfile.TemporaryDirectory() as folder:
                    server.append(measure_server(arguments, engine_flags, Path(folder)))
        print(
            f"round {index + 1}: offline {offline[-1]:.1f}, server {server[-1]:.1f} output tokens/s, "
            f"ratio {server[-1] / offline[-1]:.3f}",
            file=sys.stderr,
        )
    median_ratio = statistics.median(s / o for s, o in zip(server, offline, strict=True))
    report = {
        "benchmark": "server_overhead",
        "offline_tokens_per_s": [round(value, 1) for value in offline],
        "server_tokens_per_s": [round(value, 1) for value in server],
        "median_ratio": round(median_ratio, 4),
        # Other load only ever slows a run down, so the best of each is nearest to what it can do.
        "best_ratio": round(max(server) / max(offline), 4),
        "goal": GOAL,
        "settings": {k: v for k, v in vars(arguments).items() if k != "offline_worker"} | {"engine": engine_flags},
    }
    print(json.dumps(report))
    return 0 if median_ratio >= GOAL else 1


def parse() -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and the rest, which are the engine's."""
    parser = make_parser()
    arguments, engine_flags = argparse.ArgumentParser.parse_known_args(parser)
    checker = FlagParser(prog=parser.prog)
    EngineArgs.add_cli_args(checker)
    checker.parse_args(engine_flags)
    return arguments, engine_flags


if __name__ == "__main__":
    sys.exit(main())
