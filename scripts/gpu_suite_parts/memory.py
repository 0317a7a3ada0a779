"""A random load in a cache as large as it may be: no out-of-memory, every request ends, no block is left behind."""

import random
import time
from collections import Counter
from typing import Any

from gpu_engine import DIMENSIONS, make_client

from gpu_suite_parts.report import Report, Settings

_LOAD_SECONDS = 120
_MOST_UNFINISHED = 500
_WAVE_SECONDS = 12  # of many arrivals, then of few


def sampling(generator: random.Random, longest: int) -> dict[str, Any]:
    """Greedy, filters, penalties, log probabilities, in turn."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0, "repetition_penalty": 1.2},
        {"temperature": 0.6, "logprobs": 5},
    ]
    return generator.choice(kinds) | {
        "max_tokens": generator.randint(1, longest),
        "ignore_eos": generator.random() < 0.8,
        "seed": generator.randrange(2**32),
    }


def run(settings: Settings, report: Report) -> None:
    import torch

    from atom.model_engine.protocol import EngineRequest
    from atom.sampling_params import SamplingParams

    report.plan(["random load"])
    on_gpu = torch.cuda.is_available()
    name = "tiny" if settings.tiny else "qwen3-0.6b"
    longest_prompt, longest_output = (60, 20) if settings.tiny else (8000, 500)
    started = time.monotonic()
    client = make_client(
        name, level=settings.level, mode=settings.mode, max_model_len=longest_prompt + longest_output,
        **({"num_kvcache_blocks": 64} if settings.tiny else {"gpu_memory_utilization": 0.9}),
    )  # fmt: skip
    ready = time.monotonic()
    print(f"engine ready after {ready - started:.1f} s; {client.core.plan}", flush=True)
    seconds = 3 if settings.tiny else min(_LOAD_SECONDS, settings.left - 25)
    vocab_size = DIMENSIONS[name]["vocab_size"]
    generator = random.Random(0)
    pending: set[str] = set()
    ends: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    least_free, told = float("inf"), ready
    while time.monotonic() - ready < seconds or client.has_unfinished():
        loading = time.monotonic() - ready < seconds
        # Arrivals in bursts, up to more than fit at once.
        most = _MOST_UNFINISHED if (time.monotonic() - ready) // _WAVE_SECONDS % 2 == 0 else _MOST_UNFINISHED // 8
        if loading and len(pending) < most and generator.random() < 0.2:
            for _ in range(min(generator.randint(1, 30), most - len(pending))):
                # Most prompts are short, as they are; some are as long as they may be.
                length = 1 + int((longest_prompt - 1) * generator.random() ** 2)
                request_id = str(counts["requests"])
                client.add_request(
                    EngineRequest(
                        request_id=request_id,
                        prompt_token_ids=generator.choices(range(vocab_size), k=length),
                        sampling_params=SamplingParams(**sampling(generator, longest_output)),
                        arrival_time=0.0,
                    )
                )
                pending.add(request_id)
                counts["requests"] += 1
                counts["prompt tokens"] += length
        if pending and (generator.random() < 0.02 or (not loading and not ends["abort, at the end"])):
            # Some leave; when the load ends most do, so that the rest is done soon.
            some = generator.sample(sorted(pending), 1 if loading else len(pending) * 3 // 4)
            client.abort(some)
            pending.difference_update(some)
            ends["abort" if loading else "abort, at the end"] += len(some)
        for out in client.step():
            if out.request_id not in pending:
                counts["outputs of aborted requests"] += 1
            counts["output tokens"] += len(out.new_token_ids)
            counts["tokens out of range"] += sum(not 0 <= token < vocab_size for token in out.new_token_ids)
            if out.finish_reason is not None:
                pending.discard(out.request_id)
                ends[out.finish_reason] += 1
        counts["steps"] += 1
        if on_gpu and counts["steps"] % 20 == 0:
            least_free = min(least_free, torch.cuda.mem_get_info()[0])
        if time.monotonic() - told > 15:
            told = time.monotonic()
            print(f"{told - ready:4.0f} s: {dict(counts)}, {len(pending)} unfinished, {client.stats()}", flush=True)
    stats = client.stats()
    client.core.scheduler.check()
    problems = [f"{len(pending)} requests without an end"] if pending else []
    problems += [f"{ends['error']} errors"] if ends["error"] else []
    problems += [f"{stats['blocks_in_use']:.0f} blocks in use"] if stats["blocks_in_use"] else []
    bad = ("outputs of aborted requests", "tokens out of range")
    problems += [f"{counts[what]} {what}" for what in bad if counts[what]]
    row: dict[str, Any] = dict(counts) | {"ends": dict(ends), "preemptions": stats["preemptions"], "seconds": seconds}
    text = f"{seconds:.0f} s, {counts['requests']} requests, {stats['preemptions']:.0f} preemptions"
    if on_gpu:
        total = torch.cuda.mem_get_info()[1]
        row |= {
            "peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved(),
            "least_free": least_free, "total": total,
        }  # fmt: skip
        text += f", {row['peak_reserved'] / 2**30:.1f} GiB reserved at the peak, {least_free / 2**30:.1f} GiB left of "
        text += f"{total / 2**30:.1f}"
    report.row(row)
    client.close()
    short = "" if settings.tiny or seconds >= _LOAD_SECONDS - 1 else f" (of {_LOAD_SECONDS} s: budget)"
    report.case("random load", "failed" if problems else "ok", "; ".join([*problems, text + short]))
