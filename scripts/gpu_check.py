"""Are the Triton kernels right and fast on this machine's GPU? One command, a few minutes, one JSON line at the end.

    python scripts/gpu_check.py [--only correctness|timing] [--workers N] [--filter NAME]

Correctness: every case of tests/kernels/checks_triton.py, in several processes, as compiling takes the time.
Timing: device time of a call inside a CUDA graph (host time of a plain call beside it), on data that is not in the
L2 cache, against the time that moving its bytes or multiplying its numbers takes at least, at the rates measured in
this run. Needs torch, triton and numpy. Without a GPU and with TRITON_INTERPRET=1, it checks the small cases.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("scripts", "benchmarks", "tests/kernels"))]

import torch  # noqa: E402
from gpu_engine import measure_limits  # noqa: E402
from gpu_suite_parts.pool import run_tasks  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L2_BYTES = 200e6  # data of this size has left the L2 cache before it is used again
BF16 = torch.bfloat16


def cases() -> list[Any]:
    import checks_triton

    if DEVICE == "cpu":
        return checks_triton.small_cases()
    return checks_triton.full_cases(checks_triton.native_float8())


def run_case(index: int) -> float:
    """The error of one case; runs in a worker."""
    _, check, args, kwargs = cases()[index]
    return check(DEVICE, *args, **kwargs)


def run_small(kernel: str) -> None:
    """A few small cases of one kernel, in this process: for tools that watch it."""
    import checks_triton

    small = checks_triton.small_cases()
    mine = [case for case in cases() if case[0] == kernel and case in small]
    for _, check, args, kwargs in mine[:: -(-len(mine) // 4)]:
        check(DEVICE, *args, **kwargs)


# The longest to compile come first.
SLOW = ("paged_attention", "sample", "fused_experts")


def correctness(workers: int, wanted: str, deadline: float = float("inf")) -> dict[str, Any]:
    """Runs the cases and prints a line a kernel; per kernel: cases, failures, cases not run and the largest error."""
    from checks_triton import case_id

    grid = cases()
    order = [i for i, case in enumerate(grid) if wanted in case[0]]
    order.sort(key=lambda i: SLOW.index(grid[i][0]) if grid[i][0] in SLOW else len(SLOW))
    started = time.monotonic()
    summary: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for index, outcome in run_tasks(run_case, order, workers, deadline):
        entry = summary.setdefault(grid[index][0], {"cases": 0, "failed": 0, "not_run": 0, "max_error": 0.0})
        entry["cases"] += 1
        if not outcome.finished:
            entry["not_run"] += 1
        elif outcome.problem:
            entry["failed"] += 1
            failures.append(f"{case_id(grid[index])}: {outcome.problem}")
            print("  FAILED", failures[-1], flush=True)
        else:
            entry["max_error"] = max(entry["max_error"], outcome.value)
    print(f"correctness ({time.monotonic() - started:.0f} s, {workers} processes)")
    print(f"  {'kernel':20} {'cases':>6} {'failed':>7} {'not run':>8} {'max error':>10}")
    for name, entry in sorted(summary.items()):
        verdict = "FAIL" if entry["failed"] else "ok"
        counts = f"{entry['cases']:6} {entry['failed']:7} {entry['not_run']:8}"
        print(f"  {name:20} {counts} {entry['max_error']:10.1e}  {verdict}", flush=True)
        entry["max_error"] = float(f"{entry['max_error']:.3g}")
    return {"kernels": summary, "failures": sorted(failures)}


@dataclass
class Work:
    """One thing to time: calls[i] does the same work on other data; bytes and flops of one call."""

    name: str
    calls: list[Callable[[], Any]]
    bytes: float
    flops: float = 0.0


def copies_for(size: float) -> int:
    return max(1, min(64, int(L2_BYTES // size) + 1))


def device_seconds(calls: list[Callable[[], Any]], seconds: float = 0.15) -> float:
    """Device time of one call: the best of several replays of a graph that holds all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best, spent = float("inf"), 0.0
    graph.replay()
    for _ in range(200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
        best = min(best, elapsed / len(calls))
        spent += elapsed
        if spent > seconds:
            break
    return best


def host_seconds(call: Callable[[], Any]) -> float:
    """Time that the host needs to launch one call."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        best = min(best, (time.perf_counter() - start) / 20)
        torch.cuda.synchronize()
    return best


def attention_work(
    name: str, query_lens: list[int], seq_lens: list[int], cache_dtype: torch.dtype = BF16, block_size: int = 16
) -> Work:
    """paged_attention with Qwen3-8B's heads; query lengths are all 1 or all more."""
    from atom.kernels.triton.attention import paged_attention

    num_heads, num_kv_heads, head_dim = 32, 8, 128
    requests, tokens = len(seq_lens), sum(query_lens)
    num_decodes = requests if max(query_lens) == 1 else 0
    kv_bytes = (
        sum(seq_lens) * num_kv_heads * 2 * (head_dim * cache_dtype.itemsize + (4 if cache_dtype.itemsize == 1 else 0))
    )
    widest = -(-max(seq_lens) // block_size)
    copies = copies_for(kv_bytes)
    num_blocks = copies * requests * widest
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    caches = [torch.empty(shape, dtype=BF16, device=DEVICE).normal_().to(cache_dtype) for _ in range(2)]
    scales: list[Any] = [None, None]
    if cache_dtype.itemsize == 1:
        scales = [torch.ones(shape[:-1], device=DEVICE) for _ in range(2)]
    tables = torch.randperm(num_blocks, device=DEVICE).int().view(copies, requests, widest)
    query = torch.randn(tokens, num_heads, head_dim, device=DEVICE, dtype=BF16)
    output = torch.empty_like(query)
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    longest_query, longest = max(query_lens), max(seq_lens)

    def call(table: torch.Tensor) -> None:
        paged_attention(
            query, *caches, starts, lens, table, output, 0.088, num_decodes, longest_query, longest, 0, *scales
        )

    seen = sum(q * (s - q) + q * (q + 1) / 2 for q, s in zip(query_lens, seq_lens, strict=True))
    flops = 4 * seen * num_heads * head_dim
    io = 2 * query.numel() * query.element_size()
    return Work(name, [lambda t=t: call(t) for t in tables], kv_bytes + io, flops)


def elementwise_work(tokens: int) -> Iterator[Work]:
    """Qwen3-8B's: hidden size 4096, intermediate size 12288."""
    from atom.kernels.triton.activation import silu_and_mul
    from atom.kernels.triton.kv_cache import store_kv
    from atom.kernels.triton.norm import add_rms_norm, rms_norm
    from atom.kernels.triton.rotary import rotary_embedding_

    def data(*shape: int) -> list[torch.Tensor]:
        size = 2 * torch.Size(shape).numel()
        return [torch.randn(shape, device=DEVICE, dtype=BF16) for _ in range(copies_for(size))]

    weight = torch.randn(4096, device=DEVICE, dtype=BF16)
    rows = data(tokens, 4096)
    row_bytes = tokens * 4096 * 2
    yield Work(f"rms_norm T={tokens}", [lambda x=x: rms_norm(x, weight, 1e-6) for x in rows], 2 * row_bytes)
    residuals = data(tokens, 4096)
    pairs = list(zip(rows, residuals, strict=True))
    yield Work(
        f"add_rms_norm T={tokens}", [lambda x=x, r=r: add_rms_norm(x, r, weight, 1e-6) for x, r in pairs], 4 * row_bytes
    )
    wide = data(tokens, 2 * 12288)
    yield Work(f"silu_and_mul T={tokens}", [lambda x=x: silu_and_mul(x) for x in wide], 3 * tokens * 12288 * 2)
    del wide

    fused = [x.view(tokens, 48, 128) for x in data(tokens, 48 * 128)]
    head_weight = torch.randn(128, device=DEVICE, dtype=BF16)
    yield Work(
        f"rms_norm per head T={tokens}",
        [lambda x=x: rms_norm(x[:, :32], head_weight, 1e-6) for x in fused],
        2 * tokens * 32 * 128 * 2,
    )
    angle = torch.randn(40960, 64, device=DEVICE)
    angles = torch.cat([angle.cos(), angle.sin()], dim=1)
    positions = torch.randint(40960, (tokens,), device=DEVICE)
    yield Work(
        f"rotary T={tokens}",
        [lambda x=x: rotary_embedding_(positions, x[:, :32], x[:, 32:40], angles) for x in fused],
        2 * tokens * 40 * 128 * 2 + tokens * 128 * 4,
    )
    slots = torch.randperm(tokens * 4, device=DEVICE)[:tokens]
    for cache_dtype, label in ((BF16, "bf16"), (torch.float8_e4m3fn, "fp8")):
        if cache_dtype.itemsize == 1 and torch.version.hip:
            continue
        shape = (tokens // 4, 16, 8, 128)
        caches = [torch.zeros(shape, device=DEVICE).to(cache_dtype) for _ in range(2)]
        scales = [torch.zeros(shape[:-1], device=DEVICE) for _ in range(2)] if cache_dtype.itemsize == 1 else []
        yield Work(
            f"store_kv {label} T={tokens}",
            [lambda x=x, c=caches, s=scales: store_kv(x[:, 32:40], x[:, 40:], *c, slots, *s) for x in fused],
            2 * tokens * 8 * 128 * (2 + cache_dtype.itemsize),
        )


def quant_ops(weight: torch.Tensor, *form: Any) -> dict[str, tuple[Callable[..., Any], int]]:
    """Each fused op and its two apart; with how many bytes an element the fused one moves, the limit of both.

    form: the dtype and the group size.
    """
    from atom.kernels.triton.activation import silu_and_mul
    from atom.kernels.triton.norm import add_rms_norm, rms_norm
    from atom.kernels.triton.quant import add_rms_norm_quant, quantize, rms_norm_quant, silu_and_mul_quant

    return {
        "quantize": (lambda x, _: quantize(x, *form), 3),
        "rms_norm_quant": (lambda x, _: rms_norm_quant(x, weight, 1e-6, *form), 3),
        "rms_norm, quantize": (lambda x, _: quantize(rms_norm(x, weight, 1e-6), *form), 3),
        "add_rms_norm_quant": (lambda x, y: add_rms_norm_quant(x, y, weight, 1e-6, *form), 7),
        "add_rms_norm, quantize": (lambda x, y: quantize(add_rms_norm(x, y, weight, 1e-6)[0], *form), 7),
        "silu_and_mul_quant": (lambda x: silu_and_mul_quant(x, *form), 5),
        "silu_and_mul, quantize": (lambda x: quantize(silu_and_mul(x), *form), 5),
    }


def quant_work(tokens: int) -> Iterator[Work]:
    """Qwen3-8B's rows in the GPU's float8, a scale a row or for each 128 columns."""
    from checks_triton import native_float8

    def data(count: int, width: int) -> list[list[torch.Tensor]]:
        copies = copies_for(2 * count * tokens * width)
        return [[torch.randn(tokens, width, device=DEVICE, dtype=BF16) for _ in range(count)] for _ in range(copies)]

    narrow, wide = (4096, data(2, 4096)), (12288, data(1, 2 * 12288))
    weight = torch.randn(4096, device=DEVICE, dtype=BF16)
    for group, label in ((None, "row"), (128, "1x128")):
        for name, (op, each) in quant_ops(weight, native_float8(), group).items():
            size, inputs = wide if "silu" in name else narrow
            scales = 1 if group is None else size // group
            yield Work(
                f"{name} {label} T={tokens}",
                [partial(op, *tensors) for tensors in inputs],
                tokens * (each * size + 4 * scales),
            )


def quant_linear_work(tokens: int) -> Iterator[Work]:
    """Qwen3-8B's gate and up projections; the limit is that of bf16, which float8 may pass where it is compute."""
    from checks_triton import native_float8

    from atom.kernels.triton.quant import quantize
    from atom.kernels.triton.quant_linear import quant_linear

    rows, size = 2 * 12288, 4096
    for group, label in ((None, "row"), (128, "1x128")):
        weights = [
            quantize(torch.randn(rows, size, device=DEVICE, dtype=BF16), native_float8(), group)
            for _ in range(copies_for(rows * size))
        ]
        x = quantize(torch.randn(tokens, size, device=DEVICE, dtype=BF16), native_float8(), group)
        yield Work(
            f"quant_linear {label} T={tokens}",
            [lambda w=w, s=s, x=x, g=group: quant_linear(*x, w, s, None, g, rows, BF16) for w, s in weights],
            rows * size + tokens * (size + 2 * rows),
            2 * tokens * rows * size,
        )


def sampling_work(rows: int) -> Iterator[Work]:
    from atom.kernels.triton.sampling import sample

    logits = [torch.randn(rows, 151936, device=DEVICE) * 3 for _ in range(copies_for(rows * 151936 * 4))]
    heat = torch.full((rows,), 0.7, device=DEVICE)
    uniform = torch.rand(rows, device=DEVICE)
    k = torch.full((rows,), 20, device=DEVICE, dtype=torch.int32)
    p = torch.full((rows,), 0.95, device=DEVICE)
    size = rows * 151936 * 4
    for label, filters in (("plain", (None, None, None)), ("top-p", (None, p, None)), ("top-k top-p", (k, p, None))):
        yield Work(
            f"sample {label} R={rows}",
            [lambda x=x, f=filters: sample(x, heat, *f, uniform) for x in logits],
            size,
        )


def moe_work(tokens: int) -> Work:
    """Qwen3-30B-A3B's experts."""
    from atom.kernels.triton.moe import fused_experts

    num_experts, choices, size, intermediate = 128, 8, 2048, 768
    w13 = torch.randn(num_experts, 2 * intermediate, size, device=DEVICE, dtype=BF16) * 0.02
    w2 = torch.randn(num_experts, size, intermediate, device=DEVICE, dtype=BF16) * 0.02
    calls, active = [], 0
    for _ in range(8):
        x = torch.randn(tokens, size, device=DEVICE, dtype=BF16)
        weights, ids = torch.rand(tokens, num_experts, device=DEVICE).softmax(-1).topk(choices)
        active = len(ids.unique())
        calls.append(lambda x=x, weights=weights, ids=ids: fused_experts(x, w13, w2, weights, ids))
    per_expert = 3 * size * intermediate
    return Work(f"fused_experts T={tokens}", calls, active * per_expert * 2, 2 * tokens * choices * per_expert)


def routing_work(tokens: int) -> Iterator[Work]:
    from atom.kernels.triton.routing import order_by_expert, route_experts

    logits = [torch.randn(tokens, 128, device=DEVICE, dtype=BF16) for _ in range(8)]
    size = tokens * (128 * 2 + 8 * 8)
    yield Work(f"route_experts T={tokens}", [lambda x=x: route_experts(x, 8, True) for x in logits], size)
    ids = [route_experts(x, 8, True)[1] for x in logits]
    yield Work(f"order_by_expert T={tokens}", [lambda i=i: order_by_expert(i, 128) for i in ids], tokens * 8 * 8)


def works() -> Iterator[Callable[[], Any]]:
    """Makers, so that only one's data is alive at a time."""
    for batch, context in itertools.product((1, 16, 64, 256), (1024, 8192)):
        yield lambda b=batch, c=context: [attention_work(f"decode B={b} ctx={c}", [1] * b, [c] * b)]
    yield lambda: [attention_work("decode B=64 ctx=256..8192", [1] * 64, [256 + 126 * i for i in range(64)])]
    if not torch.version.hip:
        yield lambda: [attention_work("decode fp8 B=64 ctx=8192", [1] * 64, [8192] * 64, torch.float8_e4m3fn)]
    yield lambda: [attention_work("prefill 1024", [1024], [1024])]
    yield lambda: [attention_work("prefill 8192", [8192], [8192])]
    yield lambda: [attention_work("prefill 8x1024", [1024] * 8, [1024] * 8)]
    yield lambda: [attention_work("chunk 512 of 8192", [512], [8192])]
    for tokens in (256, 8192):
        yield lambda t=tokens: elementwise_work(t)
    for tokens in (1, 64, 1024, 8192):
        yield lambda t=tokens: quant_work(t)
    for tokens in (1, 16, 64, 256, 8192):
        yield lambda t=tokens: quant_linear_work(t)
    for rows in (1, 64, 256):
        yield lambda r=rows: sampling_work(r)
    for tokens in (1, 8, 9, 16, 64, 4096):
        yield lambda t=tokens: [moe_work(t)]
        yield lambda t=tokens: routing_work(t)


def sdpa_work() -> Work:
    """torch's own attention on contiguous tensors, as a yardstick for `prefill 8192`."""
    query, key, value = (torch.randn(1, h, 8192, 128, device=DEVICE, dtype=BF16) for h in (32, 8, 8))
    attend = torch.nn.functional.scaled_dot_product_attention
    call = lambda: attend(query, key, value, is_causal=True, enable_gqa=True)  # noqa: E731
    return Work("(torch sdpa 8192)", [call], 0, 4 * 8192 * 8193 / 2 * 32 * 128)


def timing(wanted: str) -> dict[str, Any]:
    started = time.monotonic()
    limits = measure_limits()
    bandwidth, rate = limits["bandwidth"], limits["matmul"]
    print(f"limits: copy {bandwidth / 1e12:.2f} TB/s, bf16 matmul {rate / 1e12:.0f} TFLOP/s")
    print(f"  {'kernel':34} {'us':>9} {'limit us':>9} {'% of limit':>10} {'bound':>8} {'host us':>8}")
    results = []
    for make in [*works(), lambda: [sdpa_work()]]:
        items = iter(make())
        while True:
            try:
                work = next(items)
            except StopIteration:
                break
            except torch.cuda.OutOfMemoryError:
                print("  (not enough memory for the next)")
                break
            if wanted not in work.name:
                continue
            try:
                seconds, host = device_seconds(work.calls), host_seconds(work.calls[0])
            except Exception as error:
                print(f"  {work.name:34} FAILED {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                results.append({"name": work.name, "error": str(error)[:200]})
                continue
            memory, compute = work.bytes / bandwidth, work.flops / rate
            limit, bound = max((memory, "memory"), (compute, "compute"))
            row = {
                "name": work.name,
                "us": round(seconds * 1e6, 2),
                "limit_us": round(limit * 1e6, 2),
                "percent": round(100 * limit / seconds, 1),
                "bound": bound,
                "host_us": round(host * 1e6, 1),
            }
            results.append(row)
            print(
                f"  {row['name']:34} {row['us']:9.1f} {row['limit_us']:9.1f} {row['percent']:9.1f}% "
                f"{bound:>8} {row['host_us']:8.1f}",
                flush=True,
            )
            del work
        torch.cuda.empty_cache()
    print(f"timing took {time.monotonic() - started:.0f} s")
    return {"copy_TBps": round(bandwidth / 1e12, 3), "matmul_TFLOPs": round(rate / 1e12, 1), "kernels": results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("correctness", "timing"))
    parser.add_argument("--workers", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--filter", default="", help="only kernels whose name contains this")
    parser.add_argument("--run-small", metavar="KERNEL", help="run a few small cases of it in this process, and end")
    args = parser.parse_args()
    if args.run_small:
        run_small(args.run_small)
        return 0
    import triton

    if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
        print("gpu_check: no GPU here; TRITON_INTERPRET=1 checks the small cases on the CPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    if args.only != "timing":
        report["correctness"] = correctness(args.workers, args.filter)
    if args.only != "correctness" and DEVICE == "cuda":
        report["timing"] = timing(args.filter)
    print(json.dumps(report))
    return 1 if report.get("correctness", {}).get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
