"""The engine on one GPU against the chip's own limits: decode, prefill and a mixed workload.

Needs no network, no weights and no tokenizer: dummy weights in the dimensions of well-known models, token ids
in and out. Limits are measured in the same run. `python benchmarks/gpu_engine.py --help`; the last line is JSON.
Measures greedy sampling alone, and no server. The model "tiny" is for a try on a CPU.

A decode's limit is the bytes that it reads (weights once, each request's cache) at the rate of a large copy, read
and written; a prefill's its operations at the rate of a large bf16 product; the mixed workload's is the sum of both.
"""

import argparse
import json
import logging
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

Row = dict[str, Any]

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
    "tiny": dict(
        kind="Qwen3", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128, vocab_size=512, tie_word_embeddings=True,
    ),
}  # fmt: skip
GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024]  # over 512: prompts
_WARM_STEPS, _STEPS, _PROFILED_STEPS = 5, 32, 6
_CLOSE = 0.8  # lines below this share of their limit are profiled


def measure_limits() -> dict[str, float]:
    """Bytes per second of a large copy (read plus written) and of the better of two reductions; FLOP per second of a
    large bf16 and, where there is one, fp8 product."""
    import torch

    found = _measure_rates("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _measure_rates(device: str) -> dict[str, float]:
    import torch

    size, side = (1 << 31, 8192) if device == "cuda" else (1 << 24, 256)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    numbers = source.view(torch.float32)
    found = {"bandwidth": 2 * size / _median_seconds(lambda: target.copy_(source))}
    found["read"] = size / min(_median_seconds(numbers.sum), _median_seconds(numbers.amax))
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["matmul"] = 2 * side**3 / _median_seconds(lambda: a @ b)
    try:
        x, y, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)
        product = lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
        found["fp8_matmul"] = 2 * side**3 / _median_seconds(product)
    except (RuntimeError, NotImplementedError):
        pass  # a chip without it
    return found


def _median_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    import torch

    times = []
    for _ in range(repeats + 3):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def make_client(name: str, *, level: int, mode: str, cache_dir: str = "", **settings: Any) -> Any:
    """An engine in this process with dummy weights; settings: fields of Config."""
    import transformers

    from atom.config import CompilationConfig, config_from_kwargs
    from atom.model_engine.engine_client import InprocClient

    dimensions = dict(DIMENSIONS[name])
    kind = dimensions.pop("kind")
    config = getattr(transformers, f"{kind}Config")(**dimensions, max_position_embeddings=40960)
    config.architectures = [f"{kind}ForCausalLM"]
    config.dtype = "bfloat16"
    compilation = CompilationConfig(
        level=level, cudagraph_mode=mode, cudagraph_capture_sizes=GRAPH_SIZES, cache_dir=cache_dir
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return InprocClient(config_from_kwargs(folder, load_dummy=True, compilation_config=compilation, **settings))


class StartUp(logging.Handler):
    """What the engine's log says of how long its start took: {"weights loaded": seconds, ...}."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"([\w ]+).*? in ([\d.]+) s\b", record.getMessage()):
            self.seconds[found[1].strip()] = float(found[2])


class Profile:
    """Device time of some steps by kind of kernel, from torch's profiler."""

    GROUPS = ("attention", "GEMM", "other")

    def __init__(self, run: Callable[[], int]) -> None:
        """run: does some steps and returns how many."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.steps = run()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        events = [e for e in profiler.events() if e.device_type == cuda and not e.name.startswith("ProfilerStep")]
        self.by_group = dict.fromkeys(self.GROUPS, 0.0)
        by_name: dict[str, float] = {}
        spans = []
        for event in events:
            start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
            spans.append((start, end))
            self.by_group[kind_of_kernel(event.name)] += end - start
            by_name[event.name] = by_name.get(event.name, 0.0) + end - start
        self.busy = _covered(spans)
        self.longest = sorted(by_name.items(), key=lambda item: -item[1])[:8]
        self.num_kernels = len(events)

    def split(self, step: float) -> Row:
        """Of a step of so many seconds: the device's busy share, ms by group, and ms in which it has nothing to do."""
        milliseconds = {name: 1e3 * seconds / self.steps for name, seconds in self.by_group.items()}
        milliseconds["host or idle"] = max(0.0, 1e3 * (step - self.busy / self.steps))
        return {
            "busy_share": min(1.0, self.busy / self.steps / step), "split_ms": milliseconds,
            "kernels_a_step": self.num_kernels / self.steps,
            "longest_ms": [(name[:80], 1e3 * seconds / self.steps) for name, seconds in self.longest],
        }  # fmt: skip


def kind_of_kernel(name: str) -> str:
    lowered = name.lower()
    if name in _own_kernels("attention", "decode_") or re.search(r"attention|flash|fmha|sdpa", lowered):
        return "attention"
    products = r"gemm|nvjet|cutlass|cublas|splitk|matmul"
    if name in _own_kernels("linear", "moe", "gemm") or re.search(products, lowered):
        return "GEMM"
    return "other"


def _own_kernels(*modules: str) -> set[str]:
    """Names of the Triton kernels in modules whose names begin so."""
    if modules not in _OWN_KERNELS:
        files = [path for m in modules for path in (ROOT / "atom" / "kernels" / "triton").glob(f"{m}*.py")]
        pattern = re.compile(r"^def (\w*kernel\w*)\(", re.M)
        _OWN_KERNELS[modules] = {name for file in files for name in pattern.findall(file.read_text())}
    return _OWN_KERNELS[modules]


_OWN_KERNELS: dict[tuple[str, ...], set[str]] = {}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one span runs."""
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Bench:
    """One engine with dummy weights, and what may be measured with it."""

    def __init__(self, name: str, options: argparse.Namespace, limits: dict[str, float]) -> None:
        import torch

        self.dimensions, self.limits, self.name = DIMENSIONS[name], limits, name
        self.on_gpu = torch.cuda.is_available()
        log = StartUp()
        logging.getLogger("atom").addHandler(log)
        started = time.perf_counter()
        tiny = {"num_kvcache_blocks": 256, "max_model_len": 600, "device": "cpu"}
        self.client = make_client(
            name, level=options.level, mode=options.mode, cache_dir=options.cache_dir,
            kv_cache_dtype=options.kv_cache_dtype, attention_backend=options.attention_backend,
            max_num_batched_tokens=16384,
            **({"max_model_len": 34000} if self.on_gpu else tiny),
        )  # fmt: skip
        self.startup = {"all": time.perf_counter() - started} | log.seconds | self.client.startup
        self.core = self.client.core
        self.plan = self.core.plan
        self.count = 0
        self.host_seconds = 0.0
        for owner, method in (
            (self.core.executor, "submit"), (self.core.scheduler, "schedule"), (self.core.scheduler, "update")
        ):  # fmt: skip
            setattr(owner, method, self._timed(getattr(owner, method)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.host_seconds += time.perf_counter() - begin

        return run

    def add(self, num_prompt: int, num_output: int, seed: int = 0) -> str:
        from atom.model_engine.protocol import EngineRequest
        from atom.sampling_params import SamplingParams

        generator = random.Random(self.count + seed)
        request_id = str(self.count)
        self.client.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=generator.choices(range(self.dimensions["vocab_size"]), k=num_prompt),
                sampling_params=SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, seed=0),
                arrival_time=0.0,
            )
        )
        self.count += 1
        return request_id

    def warm_up(self) -> None:
        """A long prompt, then many that decode beside others' prompts, so that no line waits for a compiler."""
        for num_prompt, count in ((min(600, self.core.config.max_model_len - 30), 1), (100, 64 if self.on_gpu else 4)):
            for _ in range(count):
                self.add(num_prompt, 20)
                self.client.step()
            self.drain()

    def drain(self) -> tuple[int, int]:
        """(output tokens, steps) until nothing is left."""
        tokens = steps = 0
        while self.client.has_unfinished():
            tokens += sum(len(out.new_token_ids) for out in self.client.step())
            steps += 1
        return tokens, steps

    def decodes(self, context: int, batches: Sequence[int]) -> Iterator[Row]:
        """Median time of a step at about `context` tokens: of the largest batch, then of what is left of it."""
        each = _WARM_STEPS + _STEPS + _PROFILED_STEPS + 4
        grown = each * len(batches)
        prompt = max(1, context - grown // 2)
        fitting = []
        for batch in sorted(batches, reverse=True):
            if batch * (prompt + 2 * grown) > self.plan.num_cached_tokens or batch > self.core.config.max_num_seqs:
                yield self._row(f"decode {batch} x {context}", note="does not fit")
            else:
                fitting.append(batch)
        if not fitting:
            return
        # Some decode while the last are still prefilled: they need more tokens.
        running = [self.add(prompt, 2 * grown) for _ in range(fitting[0])]
        for batch in fitting:
            self.client.abort(running[batch:])
            running = running[:batch]
            while len(self.client.step()) < batch:
                assert self.client.has_unfinished(), f"{batch} requests never ran together"
            yield self._decode(batch, context)
        self.client.abort(running)
        self.drain()

    def _decode(self, batch: int, context: int) -> Row:
        for _ in range(_WARM_STEPS):
            self.client.step()
        held = sum(len(s.token_ids) for s in self.core.scheduler._running)
        times, self.host_seconds = [], 0.0
        last = time.perf_counter()
        for _ in range(_STEPS):
            self.client.step()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        step, host = statistics.median(times), self.host_seconds / _STEPS
        floor = self._weight_bytes(batch) + (held + batch * _STEPS / 2) * self._bytes_per_token()
        row = self._row(
            f"decode {batch} x {context}", step, batch / step, floor / self.limits["bandwidth"], host,
            read_share=floor / self.limits["read"] / step, mean_context=held / batch + _STEPS / 2,
        )  # fmt: skip

        def steps() -> int:
            for _ in range(_PROFILED_STEPS):
                self.client.step()
            return _PROFILED_STEPS

        return row | self._profiled(row, step, steps, always=batch >= 256)

    def prefill(self, length: int) -> Row:
        """Time to the first token of one prompt, against the matrix rate."""
        if length + 1 > min(self.plan.num_cached_tokens, self.core.config.max_model_len):
            return self._row(f"prefill {length}", note="does not fit")
        times, self.host_seconds = [], 0.0
        for _ in range(3):
            self.add(length, 1)
            begin = time.perf_counter()
            self.drain()
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times)
        floor = self._prefill_flops(length) / self.limits["matmul"]
        row = self._row(f"prefill {length}", seconds, length / seconds, floor, self.host_seconds / 3)

        def once() -> int:
            self.add(length, 1)
            self.drain()
            return 1

        return row | self._profiled(row, seconds, once)

    def mixed(self, num_requests: int = 256, shortest: int = 100, longest: int = 1024) -> Row:
        """Requests of 100-1024 random tokens in and out (seed 0), all at once."""
        generator = random.Random(0)
        lengths = [[generator.randint(shortest, longest) for _ in range(2)] for _ in range(num_requests)]
        for num_prompt, num_output in lengths:
            self.add(num_prompt, num_output)
        begin = time.perf_counter()
        self.host_seconds = 0.0
        tokens, steps = self.drain()
        seconds = time.perf_counter() - begin
        cached = sum(n * p + n * n / 2 for p, n in lengths)
        floor = (steps * self._weight_bytes(1) + cached * self._bytes_per_token()) / self.limits["bandwidth"]
        floor += sum(self._prefill_flops(p) for p, _ in lengths) / self.limits["matmul"]
        cache = self.core.config.kv_cache_dtype
        what = f"mixed: {num_requests} requests, {shortest}-{longest} in and out, {cache} cache"
        return self._row(what, seconds, tokens / seconds, floor, self.host_seconds / steps, steps=steps)

    def _profiled(self, row: Row, seconds: float, run: Callable[[], int], always: bool = False) -> Row:
        if not self.on_gpu or not (always or row["limit_share"] < _CLOSE):
            return {}
        try:
            return Profile(run).split(seconds)
        except Exception as error:  # a line is worth more than its profile
            return {"profile_error": f"{type(error).__name__}: {error}"[:200]}

    def _row(
        self, what: str, seconds: float = 0.0, rate: float = 0.0, floor: float = 0.0, host: float = 0.0, **more: Any
    ) -> Row:
        """seconds, and host's share of them, are of one step; floor: those that the limit allows."""
        row = {"model": self.name, "what": what, "ms": seconds * 1e3, "tokens_per_s": rate, "host_ms": host * 1e3}
        return row | {"limit_share": floor / seconds if seconds else 0.0} | more

    def _bytes_per_token(self) -> float:
        return self.plan.bytes_per_block / self.plan.block_size

    def _prefill_flops(self, length: int) -> float:
        d = self.dimensions
        attention = 2 * length * length * d["num_attention_heads"] * d["head_dim"] * d["num_hidden_layers"]
        return 2 * self._active_parameters() * length + attention

    def _active_parameters(self) -> float:
        """Parameters of the layers that a token meets; embedding and head are apart."""
        d = self.dimensions
        attention = d["hidden_size"] * d["head_dim"] * (2 * d["num_attention_heads"] + 2 * d["num_key_value_heads"])
        if "num_experts" in d:
            mlp = 3 * d["hidden_size"] * d["moe_intermediate_size"] * d["num_experts_per_tok"]
        else:
            mlp = 3 * d["hidden_size"] * d["intermediate_size"]
        return d["num_hidden_layers"] * (attention + mlp)

    def _weight_bytes(self, batch: int) -> float:
        """Of the weights that a step of so many requests reads, if they choose experts evenly."""
        d = self.dimensions
        head = d["hidden_size"] * d["vocab_size"]
        if "num_experts" not in d:
            return 2 * (self._active_parameters() + head)
        used = d["num_experts"] * (1 - (1 - d["num_experts_per_tok"] / d["num_experts"]) ** batch)
        one = 3 * d["hidden_size"] * d["moe_intermediate_size"]
        per_layer = self._active_parameters() / d["num_hidden_layers"] + one * (used - d["num_experts_per_tok"])
        return 2 * (d["num_hidden_layers"] * per_layer + head)


def run_model(name: str, options: argparse.Namespace) -> Iterator[Row]:
    """First {"limits", "startup"}, then a row a line; lines for which the time is up have a note that says so."""
    deadline = time.monotonic() + options.seconds
    limits = measure_limits()
    bench = Bench(name, options, limits)
    yield {"model": name, "limits": limits, "startup": bench.startup}
    bench.warm_up()
    groups: list[tuple[list[str], Callable[[], Iterator[Row]]]] = []
    for context in options.contexts:
        names = [f"decode {batch} x {context}" for batch in options.batches]
        groups.append((names, lambda c=context: bench.decodes(c, options.batches)))
    for length in options.prefills:
        groups.append(([f"prefill {length}"], lambda n=length: iter([bench.prefill(n)])))
    if options.mixed:
        shape = (256, 100, 1024) if bench.on_gpu else (8, 5, 20)
        groups.insert(1, (["mixed"], lambda: iter([bench.mixed(*shape)])))
    for names, measure in groups:
        if names and time.monotonic() > deadline - 5:
            yield from (bench._row(what, note="not run: budget") for what in names)
        elif names:
            yield from measure()


def describe(row: Row) -> str:
    if "note" in row:
        return f"{row['model']:14} {row['what']:60} {row['note']}"
    text = f"{row['model']:14} {row['what']:60} {row['ms']:10.3f} ms {row['tokens_per_s']:10.0f} tok/s "
    text += f"{row['limit_share']:6.1%} of limit, host {row['host_ms']:.2f} ms"
    if "busy_share" in row:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["split_ms"].items())
        text += f", busy {row['busy_share']:.1%} ({parts} ms)"
    return text


def run_apart(name: str, arguments: list[str]) -> Iterator[Row]:
    """`run_model` in a process of its own, so that no model sees another's memory; an error is the last row."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--models", name, "--in-process"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                yield json.loads(line.removeprefix("ROW "))
        code = process.wait()
        errors.seek(0)
        said = errors.read()
        sys.stderr.write(said)
        if code:
            last = said.strip().rpartition("\n")[2][:300]
            yield {"model": name, "what": "the process", "error": f"exit code {code}: {last}"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name in DIMENSIONS if name != "tiny"]
    parser.add_argument("--models", nargs="+", default=models, choices=DIMENSIONS)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 8192])
    parser.add_argument("--prefills", nargs="*", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--no-mixed", dest="mixed", action="store_false")
    parser.add_argument("--level", type=int, default=0)
    parser.add_argument("--mode", default="FULL_DECODE_ONLY")
    parser.add_argument("--kv-cache-dtype", default="bf16")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--cache-dir", default="")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no line of a model after so many")
    parser.add_argument("--in-process", action="store_true", help="run the one model here (used for each by default)")
    return parser


def main() -> int:
    options = make_parser().parse_args()
    if options.in_process:
        (name,) = options.models
        for row in run_model(name, options):
            print("ROW " + json.dumps(row), flush=True)
        return 0
    arguments = sys.argv[1:]
    if "--models" in arguments:
        at = arguments.index("--models")
        del arguments[at : at + 1 + len(options.models)]
    rows = []
    for name in options.models:
        for row in run_apart(name, arguments):
            rows.append(row)
            print(describe(row) if "ms" in row or "note" in row else json.dumps(row), flush=True)
    print(json.dumps(rows))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
