"""What an engine on a GPU has to do, as plain calls: tests/gpu and scripts/gpu_suite.py run them.

A case takes a `Family`, the folder for its caches, and raises AssertionError. Without a GPU the cases that need none
run on the CPU, which shows that they are right themselves.
"""

import contextlib
import itertools
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
from tiny_models import FAMILIES, make_model

from atom.config import CompilationConfig, config_from_kwargs
from atom.layers.attention.base import LongPart
from atom.layers.attention.long_prompts import LongPrompts
from atom.layers.sampler import apply_masks_
from atom.model_engine.engine_client import InprocClient
from atom.model_engine.protocol import EngineRequest
from atom.sampling_params import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [23, 1, 2, 15, 16, 17, 31, 33, 48, 64, 65, 70, 7, 90, 40, 3, 55]
NUM_OUTPUT = 32
MODES: dict[str, dict[str, Any]] = {
    "eager": {"level": 0, "use_cudagraph": False},
    "full": {"level": 0, "cudagraph_mode": "FULL"},
    "full-decode": {"level": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "dynamo": {"level": 1},
    "once": {"level": 2, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "piecewise": {"level": 3},
    "piecewise-copy": {"level": 3, "cudagraph_copy_inputs": True},
    "full-and-piecewise": {"level": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"},
}
SCHEDULING: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 33},
    "prefix": {"enable_prefix_caching": True},
    "block-1": {"kv_cache_block_size": 1, "num_kvcache_blocks": 8192},
    "block-64": {"kv_cache_block_size": 64},
    "preempt": {"num_kvcache_blocks": 24},
    "torch": {"attention_backend": "torch"},
}


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint, prompts, and transformers' greedy tokens in float32: any token, or even ones alone."""

    name: str
    path: str
    prompts: list[list[int]]
    expected: list[list[int]]
    expected_even: list[list[int]]


def make_family(name: str, folder: Path) -> Family:
    model = make_model(name)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts[8][:32] = prompts[10][:32]  # a shared prefix
    expected = [_greedy(model, prompt) for prompt in prompts]
    return Family(name, str(folder), prompts, expected, [_greedy(model, prompt, 2) for prompt in prompts[:6]])


def _greedy(model: Any, prompt: list[int], every: int = 1) -> list[int]:
    """Continues with tokens that `every` divides."""
    tokens: list[int] = []
    cache, ids = None, torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(NUM_OUTPUT):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens.append(every * int(out.logits[0, -1, ::every].argmax()))
            ids = torch.tensor([[tokens[-1]]])
    return tokens


@contextlib.contextmanager
def engine(path: str, compilation: dict[str, Any], cache_dir: Path, **settings: Any) -> Iterator[InprocClient]:
    torch._dynamo.reset()  # an earlier engine's compiled code, of another model
    sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32], "cache_dir": str(cache_dir)}
    fixed = {"device": DEVICE, "max_model_len": 192, "max_num_seqs": 32, "num_kvcache_blocks": 512}
    compilation_config = CompilationConfig(**compilation, **sizes)
    client = InprocClient(config_from_kwargs(path, compilation_config=compilation_config, **(fixed | settings)))
    yield client
    stats = client.stats()
    client.core.scheduler.check()
    client.close()
    assert stats["blocks_in_use"] == 0, f"{stats['blocks_in_use']} blocks are still in use"


def request(index: int, prompt: list[int], **params: Any) -> EngineRequest:
    sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": NUM_OUTPUT, "ignore_eos": True} | params))
    return EngineRequest(request_id=str(index), prompt_token_ids=prompt, sampling_params=sampling, arrival_time=0.0)


def drain(client: InprocClient, count: int, steps: float = math.inf) -> list[list[int]]:
    """Each request's new tokens, of so many steps or of all that are left."""
    outputs: list[list[int]] = [[] for _ in range(count)]
    while client.has_unfinished() and steps > 0:
        steps -= 1
        for out in client.step():
            outputs[int(out.request_id)] += out.new_token_ids
    return outputs


def run(
    family: Family, mode: str, cache_dir: Path, dtype: str = "float32", temperature: float = 0.0, **settings: Any
) -> tuple[list[list[int]], dict[str, float]]:
    with engine(family.path, MODES[mode], cache_dir, torch_dtype=dtype, **settings) as client:
        for i, prompt in enumerate(family.prompts):
            client.add_request(request(i, prompt, seed=i, temperature=temperature))
        return drain(client, len(family.prompts)), client.stats()


def equals_transformers(family: Family, cache_dir: Path, mode: str, scheduling: str = "") -> None:
    outputs, stats = run(family, mode, cache_dir, **SCHEDULING.get(scheduling, {}))
    wrong = [i for i, (got, want) in enumerate(zip(outputs, family.expected, strict=True)) if got != want]
    assert not wrong, f"tokens of prompts {wrong} differ"
    assert (stats["preemptions"] > 0) == (scheduling == "preempt")


def equal_in_any_mode_with_a_seed(family: Family, cache_dir: Path) -> None:
    one, other = (run(family, mode, cache_dir / mode, temperature=0.7)[0] for mode in ("eager", "full-decode"))
    assert one == other


def near_transformers(family: Family, cache_dir: Path, mode: str, scheduling: str = "", cache: str = "bf16") -> None:
    """bfloat16 rounds tiny random models to other tokens soon: most prompts' first four must agree."""
    outputs, stats = run(family, mode, cache_dir, "bfloat16", kv_cache_dtype=cache, **SCHEDULING.get(scheduling, {}))
    assert all(len(got) == NUM_OUTPUT for got in outputs)
    assert (stats["preemptions"] > 0) == (scheduling == "preempt")
    same = sum(got[:4] == want[:4] for got, want in zip(outputs, family.expected, strict=True))
    assert same > len(outputs) / 2, f"only {same} of {len(outputs)} prompts begin with float32's 4 tokens"


def fused(case: Callable[..., None], family: Family, cache_dir: Path, **arguments: Any) -> None:
    """The case with head norms, rotation and cache write in one kernel."""
    name = "ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        case(family, cache_dir, **arguments)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def waits_for_nothing_but_tokens(family: Family, cache_dir: Path, sampled: bool) -> None:
    """20 steady decode steps wait for the copy of each step's tokens and for nothing else."""
    if DEVICE == "cpu":
        raise NotImplementedError("needs a device to wait for")
    params = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "presence_penalty": 0.1} if sampled else {}
    places: Counter[str] = Counter()
    waits = 0
    wait = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        nonlocal waits
        waits += 1
        wait(event)

    with engine(family.path, MODES["full-decode"], cache_dir, torch_dtype="bfloat16") as client:
        for i in range(8):
            client.add_request(request(i, family.prompts[0], max_tokens=80, seed=i, **params))
        while len(client.step()) < 8:
            pass
        for _ in range(5):
            client.step()
        torch.cuda.synchronize()
        torch.cuda.Event.synchronize = counted  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outputs = [client.step() for _ in range(20)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.Event.synchronize = wait  # type: ignore[method-assign]
        for warning in caught:
            if "synchroniz" in str(warning.message):
                places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
        drain(client, 8)
    assert all(len(out) == 8 for out in outputs)
    assert not places, f"20 steps synchronized {sum(places.values())} times: {dict(places)}"
    assert waits == 20, f"20 steps waited {waits} times for an event"


class EvenTokens:
    """Stands in for a grammar (its library may be missing): even tokens may come, and nothing ends the answer."""

    error = None

    def __init__(self, vocab_size: int) -> None:
        self._mask = b"\x55" * -(-vocab_size // 8)

    def mask(self, ignore_ends: bool) -> bytes:
        return self._mask

    def takes_last(self, token_id: int) -> bool:
        return False


def masks_tokens(family: Family, cache_dir: Path) -> None:
    """Token masks on the device equal those on the CPU, and an engine that has them chooses among what is left."""
    generator = torch.Generator().manual_seed(0)
    for vocab_size, rows in itertools.product((157, 160, 49152, 151936), ([0], [1, 3, 4])):
        logits = torch.randn(5, vocab_size, generator=generator)
        masks = torch.randint(256, (len(rows), -(-vocab_size // 8)), generator=generator, dtype=torch.uint8)
        on_device = logits.to(DEVICE)
        apply_masks_(on_device, torch.tensor(rows, device=DEVICE), masks.to(DEVICE))
        apply_masks_(logits, torch.tensor(rows), masks)
        assert torch.equal(on_device.cpu(), logits)
    with engine(family.path, MODES["full-decode"], cache_dir, torch_dtype="float32") as client:
        prompts = family.prompts[: len(family.expected_even)]
        vocab_size = client.core.config.hf_config.vocab_size
        for i, prompt in enumerate(prompts):
            grammar: Any = EvenTokens(vocab_size) if i % 3 else None  # some in the batch are free
            client.core.scheduler.add(request(i, prompt), grammar)
        outputs = drain(client, len(prompts))
    assert outputs == [(family.expected_even if i % 3 else family.expected)[i] for i in range(len(prompts))]


def ends_by_abort(family: Family, cache_dir: Path) -> None:
    """Requests dropped while steps are under way leave the others' tokens, and no blocks."""
    with engine(family.path, MODES["full-decode"], cache_dir, torch_dtype="float32") as client:
        for i, prompt in enumerate(family.prompts):
            client.add_request(request(i, prompt))
        before = drain(client, len(family.prompts), steps=3)
        client.abort([str(i) for i in range(0, len(family.prompts), 2)])
        after = drain(client, len(family.prompts))
    assert not any(after[::2])
    assert [a + b for a, b in zip(before[1::2], after[1::2], strict=True)] == family.expected[1::2]


class SmallParts(LongPrompts):
    """Cuts where a tiny model's prompts are long, and counts: of fresh prompts and of chunks after cached tokens."""

    cuts: Counter[str] = Counter()

    def __init__(self) -> None:
        super().__init__(shortest=64, step=32, long_from=128, long_step=64, piece=32)

    def attend(self, part: LongPart, *args: Any) -> torch.Tensor:
        self.cuts["chunk" if part.context else "fresh"] += 1
        return super().attend(part, *args)


def cuts_long_prompts(family: Family, cache_dir: Path, mode: str) -> None:
    """Prompts of odd lengths in chunks, beside others: all but two begin with the torch backend's 3 tokens."""
    if DEVICE == "cpu":
        raise NotImplementedError("needs a GPU's attention kernels")
    from atom.layers.attention.backends import triton

    generator = torch.Generator().manual_seed(1)
    lengths = [64, 245, 9, 211, 191, 240, 187, 30, 224, 199, 233, 205]
    prompts = [torch.randint(0, 150, (n,), generator=generator).tolist() for n in lengths]
    settings = {"torch_dtype": "float16", "max_model_len": 256, "max_num_batched_tokens": 150}
    rule, triton.LongPrompts = triton.LongPrompts, SmallParts  # type: ignore[misc]
    SmallParts.cuts.clear()
    try:
        outputs = []
        for backend in ("torch", "triton"):
            with engine(family.path, MODES[mode], cache_dir, attention_backend=backend, **settings) as client:
                for i, prompt in enumerate(prompts):
                    client.add_request(request(i, prompt, max_tokens=8))
                outputs.append(drain(client, len(prompts)))
                layers = client.core.executor._runner.attention_layers  # type: ignore[attr-defined]
                can_cut = any(layer.backend.long_prompts for layer in layers)
    finally:
        triton.LongPrompts = rule  # type: ignore[misc]
    assert bool(SmallParts.cuts["fresh"]) == bool(SmallParts.cuts["chunk"]) == can_cut, f"cut {SmallParts.cuts}"
    wrong = [n for n, one, other in zip(lengths, *outputs, strict=True) if one[:3] != other[:3]]
    assert len(wrong) <= 2, f"prompts of {wrong} tokens don't begin with the torch backend's 3"


def float8_weights(family: Family, cache_dir: Path, mode: str, stored: str) -> None:
    """A float8 checkpoint of the family: most prompts' first four tokens are those of transformers on what it means."""
    if family.name in ("mixtral", "qwen3_moe"):
        return  # quantized experts are refused
    from float8_models import make_quantized

    (folder := cache_dir / "float8").mkdir(parents=True)
    model = make_quantized(family.name, stored, folder)
    prompts = family.prompts[:8]
    with engine(str(folder), MODES[mode], cache_dir, torch_dtype="float32") as client:
        for i, prompt in enumerate(prompts):
            client.add_request(request(i, prompt, max_tokens=4))
        outputs = drain(client, len(prompts))
    same = 0
    for prompt, tokens in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        same += logits.argmax(-1).tolist() == tokens
    assert same > len(prompts) / 2, f"only {same} of {len(prompts)} prompts begin with the reference's 4 tokens"


Case = Callable[[Family, Path], None]


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {f"float32 {name}": partial(equals_transformers, mode=name) for name in MODES}
    for name in SCHEDULING:
        found[f"float32 {name}"] = partial(equals_transformers, mode="full-decode", scheduling=name)
    found["seed"] = equal_in_any_mode_with_a_seed
    found["abort"] = ends_by_abort
    for name in ("eager", "full", "full-decode", "full-and-piecewise"):
        found[f"bf16 {name}"] = partial(near_transformers, mode=name)
    for name in ("chunked", "prefix", "preempt"):
        found[f"bf16 {name}"] = partial(near_transformers, mode="full-decode", scheduling=name)
    for name in ("eager", "full-decode"):
        found[f"fp8-cache {name}"] = partial(near_transformers, mode=name, cache="fp8")
    for name in ("eager", "full-decode", "piecewise"):
        found[f"fused float32 {name}"] = partial(fused, equals_transformers, mode=name)
    found["fused bf16 full-decode"] = partial(fused, near_transformers, mode="full-decode")
    found["fused fp8-cache full-decode"] = partial(fused, near_transformers, mode="full-decode", cache="fp8")
    for stored in ("channel", "block"):
        for name in ("eager", "full-decode", "piecewise"):
            found[f"float8 weights {stored} {name}"] = partial(float8_weights, mode=name, stored=stored)
    found["waits, greedy"] = partial(waits_for_nothing_but_tokens, sampled=False)
    found["waits, sampled"] = partial(waits_for_nothing_but_tokens, sampled=True)
    found["token masks"] = masks_tokens
    for name in ("eager", "full-decode", "piecewise"):
        found[f"cut prompts {name}"] = partial(cuts_long_prompts, mode=name)
    return found


CASES = _cases()


def compiles(name: str) -> bool:
    """Whether the case takes long, as it compiles."""
    return any(MODES[word]["level"] > 0 for word in name.split() if word in MODES)


__all__ = ["CASES", "FAMILIES", "Family", "compiles", "make_family"]
