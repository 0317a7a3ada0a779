"""What every runner shares: the command line, the timing loop, the result line. Standard library only.

A runner is a script with an `Engine` class (constructor: the parsed arguments and the job's options; method
`generate(prompts, max_tokens) -> list of token id lists`, greedy, EOS ignored) that calls `run(Engine)`. Each engine
lives in an environment of its own: it warms up, then measures once for each line that it reads, and prints each
result as one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any, Protocol

RESULT_MARK = "RESULT "


class Engine(Protocol):
    version: str

    def __init__(self, job: "Job") -> None: ...

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]: ...


class Job:
    """One measurement: a model, a workload and an engine's options."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.model: str = spec["model"]
        self.gguf: str = spec["gguf"]
        self.prompts: list[list[int]] = spec["prompts"]
        self.max_tokens: int = spec["max_tokens"]
        self.options: dict[str, Any] = spec["options"]
        self.single_stream = len(self.prompts) == 1
        self.num_threads = len(os.sched_getaffinity(0))


def timed(engine: Engine, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    outputs = engine.generate(prompts, max_tokens)
    seconds = time.perf_counter() - start
    lengths = {len(tokens) for tokens in outputs}
    if len(outputs) != len(prompts) or lengths != {max_tokens}:
        raise RuntimeError(f"expected {len(prompts)} outputs of {max_tokens} tokens, got {len(outputs)} of {lengths}")
    return seconds, outputs


def measure(engine: Engine, job: Job) -> float:
    """Output tokens per second.

    Batched: all output tokens over the whole time. Single stream: the decode rate alone, that is the tokens after
    the first over the time they add to a run that stops at the first.
    """
    if not job.single_stream:
        return len(job.prompts) * job.max_tokens / timed(engine, job.prompts, job.max_tokens)[0]
    first = statistics.median(timed(engine, job.prompts, 1)[0] for _ in range(3))
    return (job.max_tokens - 1) / (timed(engine, job.prompts, job.max_tokens)[0] - first)


def tell(result: dict[str, Any]) -> None:
    print("\n" + RESULT_MARK + json.dumps(result), flush=True)


def run(engine_class: type[Engine]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="JSON file written by cpu_peers.py")
    with open(parser.parse_args().job) as file:
        job = Job(json.load(file))
    engine = engine_class(job)
    _, outputs = timed(engine, job.prompts, job.max_tokens)
    tell({"version": engine.version, "first_tokens": [tokens[0] for tokens in outputs]})
    for _ in sys.stdin:
        tell({"rate": measure(engine, job)})
    os._exit(0)  # engines with worker processes or native threads may hang or complain on the way out
