"""The engine on one GPU against the chip's own limits: decode, prefill and a mixed workload.

Needs no network, no weights and no tokenizer: dummy weights in the dimensions of well-known models, token ids
in and out. Limits are measured in the same run. `python benchmarks/gpu_engine.py --help`; the last line is JSON.
Does not measure sampling other than greedy, nor any server.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# ruff: noqa: C408
DIMENSIONS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": dict(
        kind="Qwen3", hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True,
    ),
    "qwen3-8b": dict(
        kind="Qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False,
    ),
    "llama-3.1-8b": dict(
        kind="Llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": dict(
        kind="Qwen3Moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, vocab_size=151936, tie_word_embeddings=False, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
    ),
}  # fmt: skip


def measure_limits() -> dict[str, float]:
    """Bytes per second of a large copy (read plus written), FLOP per second of a large bf16 product."""
    import torch

    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = _median_seconds(lambda: target.copy_(source), 10)
    matmul = _median_seconds(lambda: a @ b, 10)
    return {"bandwidth": 2 * source.numel() / copy, "matmul": 2 * 8192**3 / matmul}


def _median_seconds(call: Any, repeats: int) -> float:
    import torch

    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


class Bench:
    """One engine with dummy weights."""

    def __init__(self, name: str, options: argparse.Namespace, limits: dict[str, float]) -> None:
        import transformers

        from atom.config import CompilationConfig, config_from_kwargs
        from atom.model_engine.engine_client import InprocClient

        dimensions = dict(DIMENSIONS[name])
        kind = dimensions.pop("kind")
        self.dimensions, self.limits, self.name = dimensions, limits, name
        folder = tempfile.mkdtemp()
        config = getattr(transformers, f"{kind}Config")(**dimensions, max_position_embeddings=40960)
        config.architectures = [f"{kind}ForCausalLM"]
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
        started = time.perf_counter()
        self.client = InprocClient(
            config_from_kwargs(
                folder,
                load_dummy=True,
                kv_cache_dtype=options.kv_cache_dtype,
                max_model_len=34000,
                max_num_batched_tokens=16384,
                compilation_config=CompilationConfig(
                    level=options.level,
                    cudagraph_mode=options.mode,
                    cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32, 64, 128, 192, 256],
                    cache_dir=options.cache_dir,
                ),
            )
        )
        self.startup = time.perf_counter() - started
        self.core = self.client.core
        self.plan = self.core.plan
        self.count = 0
        self.host_seconds = 0.0
        submit, schedule, update = self.core.executor.submit, self.core.scheduler.schedule, self.core.scheduler.update

        def timed(call: Any) -> Any:
            def run(*args: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return call(*args)
                finally:
                    self.host_seconds += time.perf_counter() - begin

            return run

        self.core.executor.submit = timed(submit)  # type: ignore[method-assign]
        self.core.scheduler.schedule = timed(schedule)  # type: ignore[method-assign]
        self.core.scheduler.update = timed(update)  # type: ignore[method-assign]

    def add(self, num_prompt: int, num_output: int, seed: int = 0) -> None:
        import random

        from atom.model_engine.protocol import EngineRequest
        from atom.sampling_params import SamplingParams

        generator = random.Random(self.count + seed)
        self.client.add_request(
            EngineRequest(
                request_id=str(self.count),
                prompt_token_ids=[generator.randrange(self.dimensions["vocab_size"]) for _ in range(num_prompt)],
                sampling_params=SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, seed=0),
                arrival_time=0.0,
            )
        )
        self.count += 1

    def drain(self) -> int:
        tokens = 0
        while self.client.has_unfinished():
            tokens += sum(len(out.new_token_ids) for out in self.client.step())
        return tokens

    def decode(self, batch: int, context: int, steps: int = 40) -> dict[str, Any] | None:
        """Median time of a decode step of `batch` requests at `context` tokens."""
        if batch * (context + steps + 20) > self.plan.num_cached_tokens:
            return None
        for _ in range(batch):
            self.add(context, steps + 10)
        times: list[float] = []
        self.host_seconds = 0.0
        last = time.perf_counter()
        while self.client.has_unfinished():
            host = self.host_seconds
            outputs = self.client.step()
            now = time.perf_counter()
            if len(outputs) == batch:
                times.append(now - last)
                host_times = self.host_seconds - host
            last = now
        step = statistics.median(times[5:-2])
        kv_bytes = batch * (context + steps / 2) * self.plan.bytes_per_block / self.plan.block_size
        floor = (self._active_weight_bytes(batch) + kv_bytes) / self.limits["bandwidth"]
        return {
            "model": self.name, "what": f"decode batch {batch} context {context}", "ms": step * 1e3,
            "tokens_per_s": batch / step, "limit_share": floor / step, "host_ms": host_times * 1e3,
        }  # fmt: skip

    def prefill(self, length: int) -> dict[str, Any]:
        """Time to the first token of one prompt, against the matrix rate."""
        times = []
        for _ in range(3):
            self.add(length, 1)
            begin = time.perf_counter()
            self.drain()
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times)
        d = self.dimensions
        flops = 2 * self._active_parameters() * length
        flops += 2 * length * length * d["num_attention_heads"] * d["head_dim"] * d["num_hidden_layers"]
        return {
            "model": self.name, "what": f"prefill {length}", "ms": seconds * 1e3,
            "tokens_per_s": length / seconds, "limit_share": flops / self.limits["matmul"] / seconds, "host_ms": 0.0,
        }  # fmt: skip

    def mixed(self, num_requests: int = 256) -> dict[str, Any]:
        """Requests of 100-1024 random tokens in and out, all at once."""
        import random

        generator = random.Random(0)
        for _ in range(num_requests):
            self.add(generator.randint(100, 1024), generator.randint(100, 1024))
        begin = time.perf_counter()
        self.host_seconds = 0.0
        tokens = self.drain()
        seconds = time.perf_counter() - begin
        return {
            "model": self.name, "what": f"mixed, {num_requests} requests of 100-1024 in and out", "ms": seconds * 1e3,
            "tokens_per_s": tokens / seconds, "limit_share": 0.0, "host_ms": self.host_seconds * 1e3,
        }  # fmt: skip

    def _active_parameters(self) -> float:
        """Parameters of the layers that a token meets; embedding and head are apart."""
        d = self.dimensions
        attention = d["hidden_size"] * d["head_dim"] * (2 * d["num_attention_heads"] + 2 * d["num_key_value_heads"])
        if "num_experts" in d:
            mlp = 3 * d["hidden_size"] * d["moe_intermediate_size"] * d["num_experts_per_tok"]
        else:
            mlp = 3 * d["hidden_size"] * d["intermediate_size"]
        return d["num_hidden_layers"] * (attention + mlp)

    def _active_weight_bytes(self, batch: int) -> float:
        d = self.dimensions
        head = d["hidden_size"] * d["vocab_size"]
        if "num_experts" not in d:
            return 2 * (self._active_parameters() + head)
        used = d["num_experts"] * (1 - (1 - d["num_experts_per_tok"] / d["num_experts"]) ** batch)
        one = 3 * d["hidden_size"] * d["moe_intermediate_size"]
        per_layer = self._active_parameters() / d["num_hidden_layers"] + one * (used - d["num_experts_per_tok"])
        return 2 * (d["num_hidden_layers"] * per_layer + head)


def run_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    limits = measure_limits()
    bench = Bench(name, options, limits)
    rows: list[dict[str, Any]] = []
    bench.add(600, 20)
    bench.drain()  # warm-up
    for batch in options.batches:
        for context in options.contexts:
            row = bench.decode(batch, context)
            if row is not None:
                rows.append(row)
    rows += [bench.prefill(length) for length in options.prefills]
    if options.mixed:
        rows.append(bench.mixed())
    for row in rows:
        print(
            f"{row['model']:14} {row['what']:48} {row['ms']:10.2f} ms {row['tokens_per_s']:10.0f} tok/s "
            f"{row['limit_share']:6.1%} of limit, host {row['host_ms']:.2f} ms",
            flush=True,
        )
    return {"limits": limits, "startup_s": bench.startup, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DIMENSIONS), choices=DIMENSIONS)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 8192])
    parser.add_argument("--prefills", nargs="*", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--no-mixed", dest="mixed", action="store_false")
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--mode", default="FULL_AND_PIECEWISE")
    parser.add_argument("--kv-cache-dtype", default="bf16")
    parser.add_argument("--cache-dir", default="")
    parser.add_argument("--in-process", action="store_true", help="run the one model here (used for each by default)")
    options = parser.parse_args()
    if options.in_process:
        (name,) = options.models
        print("RESULT " + json.dumps(run_model(name, options)))
        return
    results = {}
    for name in options.models:
        # A process each, so that no model sees another's memory.
        index = sys.argv.index("--models") if "--models" in sys.argv else None
        rest = sys.argv[1:] if index is None else sys.argv[1:index] + sys.argv[index + 1 + len(options.models) :]
        command = [sys.executable, str(Path(__file__)), *rest, "--models", name, "--in-process"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                results[name] = json.loads(line.removeprefix("RESULT "))
            else:
                print(line, flush=True)
        if done.returncode:
            print(f"{name}: failed with exit code {done.returncode}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
