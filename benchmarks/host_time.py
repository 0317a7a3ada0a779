"""What Python costs in a decode step: scheduling, rows, metadata, sampling state, bookkeeping, outputs. On one core.

A tiny model on the CPU, whose own time (forward, logits, choosing tokens) is measured apart and taken off; on a GPU
that is what runs elsewhere. All else that an engine process does in a step counts, sending its outputs to the front
end included. Prompts differ in length, so that every step has some requests that need a block.
`python benchmarks/host_time.py [--batch 256] [--sampled]`; the last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import zmq

from atom import SamplingParams
from atom.config import config_from_kwargs
from atom.model_engine import wire
from atom.model_engine.engine_core import EngineCore
from atom.model_engine.protocol import EngineRequest

GOAL_MS = 1.0


def make_core(directory: str, batch: int) -> EngineCore:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=1024, max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    return EngineCore(
        config_from_kwargs(
            directory, device="cpu", load_dummy=True, torch_dtype="float32", max_num_seqs=batch, max_model_len=4096,
            max_num_batched_tokens=65536, num_kvcache_blocks=max(batch * 64, 256),
        )
    )  # fmt: skip


class Stopwatch:
    """Adds up the time spent in some methods, step by step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def watch(self, owner: Any, name: str, label: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[label] = self.spent.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sampled", action="store_true", help="temperature, top-p and a penalty instead of greedy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        core = make_core(directory, options.batch)
        extra = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.1} if options.sampled else {"temperature": 0}
        for i in range(options.batch):
            params = SamplingParams(max_tokens=options.steps + 40, ignore_eos=True, seed=i, **extra)
            tokens = [(7 * i + j) % 1000 for j in range(options.context + i % 16)]
            core.add_request(
                EngineRequest(request_id=f"r{i}", prompt_token_ids=tokens, sampling_params=params, arrival_time=0.0)
            )
        watch = Stopwatch()
        runner = core.executor._runner  # type: ignore[attr-defined]
        for owner, name, label in (
            (core.scheduler, "schedule", "schedule"), (core.scheduler, "update", "update"),
            (runner.batch, "prepare", "prepare"), (runner.sampling, "build", "sampling state"),
            (runner.sampling, "append", "sampling state"), (runner.batch, "advance", "advance"),
            (runner.graph_runner, "run", "model"), (runner, "compute_logits", "model"), (runner, "sampler", "model"),
        ):  # fmt: skip
            watch.watch(owner, name, label)
        while sum(len(output.new_token_ids) for output in core.step()) < options.batch:
            pass
        core.step()
        with zmq.Context() as context, context.socket(zmq.PAIR) as socket, context.socket(zmq.PAIR) as front_end:
            front_end.bind("inproc://front-end")
            socket.connect("inproc://front-end")
            steps = []
            for _ in range(options.steps):
                watch.spent = {}
                start = time.perf_counter()
                outputs = core.step()
                sending = time.perf_counter()
                socket.send(wire.encode(wire.Outputs(outputs, core.stats())))
                watch.spent["sending"] = time.perf_counter() - sending
                watch.spent["step"] = time.perf_counter() - start
                watch.spent["other"] = 2 * watch.spent["step"] - sum(watch.spent.values())
                steps.append(watch.spent)
                front_end.recv()
        core.close()
    medians = {name: 1e3 * statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]}
    host = sorted(1e3 * (step["step"] - step["model"]) for step in steps)
    for name, value in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"{name:16} {value:7.3f} ms")
    median = statistics.median(host)
    print(
        f"host time a step at batch {options.batch}: median {median:.3f} ms, best {host[0]:.3f} ms (goal {GOAL_MS} ms)"
    )
    print(json.dumps({"batch": options.batch, "host_ms": median, "best_ms": host[0], "goal_ms": GOAL_MS} | medians))


if __name__ == "__main__":
    main()
