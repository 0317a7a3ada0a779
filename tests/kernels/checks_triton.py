"""Each Triton kernel against its torch reference: one check a kernel, small cases for the interpreter, many for a GPU.

A check takes the device and a case, raises AssertionError where the kernel is wrong, and returns the largest error
relative to the largest expected value. It imports nothing but torch, triton and atom.kernels.
"""

import contextlib
import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8
# Elementwise kernels round where the reference rounds; the order of sums and the exp2 differ.
TOLERANCE = {FP32: 2e-5, FP16: 2e-3, BF16: 1.6e-2}


def native_float8() -> torch.dtype:
    """The GPU's float8: gfx942 has an encoding of its own, NVIDIA and later AMD chips the common one."""
    arch = getattr(torch.cuda.get_device_properties(0), "gcnArchName", "") if torch.cuda.is_available() else ""
    return FNUZ if arch.startswith("gfx94") else FN


def ops(module: str) -> tuple[Any, Any]:
    """(reference, triton) modules of kernels."""
    return tuple(importlib.import_module(f"atom.kernels.{b}.{module}") for b in ("torch", "triton"))


def error(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> float:
    """Largest difference relative to the largest expected value; AssertionError when over the tolerance."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert not actual.isnan().any()
    if not actual.numel():
        return 0.0
    worst = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-20)
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    assert worst <= limit, f"error {float(worst):.2e} is over {limit:.1e}"
    return float(worst)


def random(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)


def check_rms_norm(device: str, shape: Sequence[int], dtype: torch.dtype, strided: bool) -> float:
    reference, kernels = ops("norm")
    if strided:  # the heads of a fused projection
        wide = random(*shape[:-1], shape[-1] + 32, dtype=dtype, device=device)
        x = wide[..., : shape[-1]]
    else:
        x = random(*shape, dtype=dtype, device=device)
    weight = random(shape[-1], dtype=dtype, device=device, seed=1)
    return error(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def check_add_rms_norm(device: str, shape: Sequence[int], dtype: torch.dtype) -> float:
    reference, kernels = ops("norm")
    x, residual = (random(*shape, dtype=dtype, device=device, seed=s) for s in (0, 1))
    weight = random(shape[-1], dtype=dtype, device=device, seed=2)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    got_normed, got_total = kernels.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    return max(error(got_normed, normed), error(got_total, total))


def check_silu_and_mul(device: str, shape: Sequence[int], dtype: torch.dtype) -> float:
    reference, kernels = ops("activation")
    x = random(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device, scale=4)
    return error(kernels.silu_and_mul(x), reference.silu_and_mul(x))


def rows_quantized(
    got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], group_size: int | None, tolerance: float
) -> float:
    """Error of values * scales. Where the rows differ in their last bits, a value may round to its neighbour."""
    wide = []
    for values, scales in (got, expected):
        repeated = scales.repeat_interleave(values.shape[1] if group_size is None else group_size, 1)
        wide.append(values.float() * repeated[:, : values.shape[1]])
    assert got[0].dtype == expected[0].dtype
    error(got[1], expected[1], tolerance)
    step = 0.01 if got[0].dtype == INT8 else 0.08
    assert (got[0].float() != expected[0].float()).float().mean() < 0.25 if got[0].numel() else True
    return error(*wide, step)


def check_quantize(
    device: str, shape: Sequence[int], dtype: torch.dtype, to: torch.dtype, group_size: int | None
) -> float:
    """Exactly. Rows are a view's; one is of zeros, one is tiny, one has ties."""
    reference, kernels = ops("quant")
    tokens, size = shape
    x = random(tokens, size + 32, dtype=dtype, device=device, scale=30)[:, :size]
    if tokens > 3:
        x[1] = 0
        x[2] *= 1e-13 if dtype != FP16 else 1e-5
        x[3] = torch.arange(size, device=device) % 255 / 2 - 63.5
    (values, scales), (expected, expected_scales) = (m.quantize(x, to, group_size) for m in (kernels, reference))
    assert values.dtype == expected.dtype
    assert torch.equal(scales, expected_scales)
    return error(values.float(), expected.float(), 0)


def check_rms_norm_quant(
    device: str, shape: Sequence[int], dtype: torch.dtype, to: torch.dtype, group_size: int | None
) -> float:
    reference, kernels = ops("quant")
    x = random(*shape, dtype=dtype, device=device)
    weight = random(shape[-1], dtype=dtype, device=device, seed=1)
    got, expected = (m.rms_norm_quant(x, weight, 1e-5, to, group_size) for m in (kernels, reference))
    return rows_quantized(got, expected, group_size, TOLERANCE[dtype])


def check_add_rms_norm_quant(
    device: str, shape: Sequence[int], dtype: torch.dtype, to: torch.dtype, group_size: int | None
) -> float:
    reference, kernels = ops("quant")
    x, residual = (random(*shape, dtype=dtype, device=device, seed=s) for s in (0, 1))
    weight = random(shape[-1], dtype=dtype, device=device, seed=2)
    *expected, total = reference.add_rms_norm_quant(x, residual, weight, 1e-5, to, group_size)
    *got, got_total = kernels.add_rms_norm_quant(x.clone(), residual.clone(), weight, 1e-5, to, group_size)
    return max(rows_quantized(got, expected, group_size, TOLERANCE[dtype]), error(got_total, total))


def check_silu_and_mul_quant(
    device: str, shape: Sequence[int], dtype: torch.dtype, to: torch.dtype, group_size: int | None
) -> float:
    reference, kernels = ops("quant")
    x = random(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device, scale=4)
    got, expected = (m.silu_and_mul_quant(x, to, group_size) for m in (kernels, reference))
    return rows_quantized(got, expected, group_size, TOLERANCE[dtype])


QUANT_CHECKS = {
    "quantize": check_quantize,
    "rms_norm_quant": check_rms_norm_quant,
    "add_rms_norm_quant": check_add_rms_norm_quant,
    "silu_and_mul_quant": check_silu_and_mul_quant,
}


def check_linear_silu_and_mul(device: str, tokens: int, size: int, intermediate: int, dtype: torch.dtype) -> float:
    reference, kernels = ops("linear")
    x = random(tokens, size, dtype=dtype, device=device)
    weight = random(2 * intermediate, size, dtype=dtype, device=device, scale=size**-0.5)
    expected = reference.linear_silu_and_mul(x, reference.prepare_silu_linear_weight(weight), intermediate)
    return error(kernels.linear_silu_and_mul(x, kernels.prepare_silu_linear_weight(weight), intermediate), expected)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_gemm(device: str, tokens: int, size: int, rows: int, dtype: torch.dtype) -> float:
    """Many tokens, with ATOM_USE_TRITON_GEMM=1."""
    _, kernels = ops("linear")
    with environment("ATOM_USE_TRITON_GEMM", "1"):
        kernels.always_ours.cache_clear()
        try:
            return max(
                check_linear(device, tokens, size, rows, dtype, True, False),
                check_linear_silu_and_mul(device, tokens, size, rows, dtype),
            )
        finally:
            kernels.always_ours.cache_clear()


def check_linear(
    device: str, tokens: int, size: int, out_features: int, dtype: torch.dtype, bias: bool, out_float32: bool
) -> float:
    reference, kernels = ops("linear")
    x = random(tokens, size, dtype=dtype, device=device)
    weight = random(out_features, size, dtype=dtype, device=device, scale=size**-0.5)
    added = random(out_features, dtype=dtype, device=device, seed=3) if bias else None
    got, expected = (
        m.linear(x, m.prepare_linear_weight(weight), added, out_features, out_float32) for m in (kernels, reference)
    )
    return error(got, expected, TOLERANCE[dtype])


def check_quant_linear(
    device: str, tokens: int, size: int, out_features: int, dtype: torch.dtype, to: torch.dtype, group_size: int | None
) -> float:
    """With a bias where out_features is odd."""
    (reference, kernels), (quant, _) = ops("quant_linear"), ops("quant")
    x = quant.quantize(random(tokens, size, dtype=dtype, device=device), to, group_size)
    weight, scales = quant.quantize(
        random(out_features, size, dtype=FP32, device=device, scale=size**-0.5, seed=1), to, group_size
    )
    bias = random(out_features, dtype=dtype, device=device, seed=3) if out_features % 2 else None
    got, expected = (
        m.quant_linear(
            *x, m.prepare_quant_weight(weight, scales, group_size, dtype), scales, bias, group_size, out_features, dtype
        )
        for m in (kernels, reference)
    )
    # Hopper's float8 products lose the lowest bits of 128 of them.
    return error(got, expected, max(TOLERANCE[dtype], 1e-3))


def check_rotary(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> float:
    reference, kernels = ops("rotary")
    num_query, num_key = heads
    qkv = random(tokens, (num_query + 2 * num_key) * head_dim, dtype=dtype, device=device)
    angle = torch.arange(300)[:, None] * 10000.0 ** -(torch.arange(rotary_dim // 2) / rotary_dim)
    cache = torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(device)
    positions = torch.arange(tokens, device=device) * 7 % 300
    got = qkv.clone()
    for module, flat in ((reference, qkv), (kernels, got)):
        query = flat[:, : num_query * head_dim].view(tokens, num_query, head_dim)
        key = flat[:, num_query * head_dim : -num_key * head_dim].view(tokens, num_key, head_dim)
        module.rotary_embedding_(positions, query, key, cache, interleaved)
    return error(got, qkv)


def check_store_kv(
    device: str,
    tokens: int,
    num_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> float:
    reference, kernels = ops("kv_cache")
    wide = random(tokens, 2 * num_heads * head_dim, dtype=dtype, device=device, scale=3)
    key, value = (part.view(tokens, num_heads, head_dim) for part in wide.chunk(2, dim=-1))
    num_blocks = tokens // block_size + 3
    order = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(0))
    slots = order[:tokens].to(device)
    slots[:: max(2, tokens // 3)] = -1
    results = []
    for module in (reference, kernels):
        caches = [torch.zeros(num_blocks, block_size, num_heads, head_dim, device=device).to(cache_dtype) for _ in "kv"]
        scales = [torch.zeros(num_blocks, block_size, num_heads, device=device) for _ in "kv"]
        if cache_dtype.itemsize > 1:
            module.store_kv(key, value, *caches, slots)
        else:
            module.store_kv(key, value, *caches, slots, *scales)
        results.append([c.float() for c in caches] + scales)
    return max(error(got, expected, 1e-6) for got, expected in zip(results[1], results[0], strict=True))


def check_qk_norm_rope_cache(
    device: str,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    norm: bool,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> float:
    """Some rows are padding. A float8 value may round to its neighbour, as a sum's order shows in the norm."""
    reference, kernels = ops("qkv")
    num_query, num_kv = heads
    qkv = random(tokens, num_query + 2 * num_kv, head_dim, dtype=dtype, device=device, scale=3)
    weights = [random(head_dim, dtype=dtype, device=device, seed=s) if norm else None for s in (1, 2)]
    angle = torch.arange(300)[:, None] * 10000.0 ** -(torch.arange(rotary_dim // 2) / rotary_dim)
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(device)
    positions = torch.arange(tokens, device=device) * 7 % 300
    num_blocks = tokens // 16 + 3
    order = torch.randperm(num_blocks * 16, generator=torch.Generator().manual_seed(0))
    slots = order[:tokens].to(device)
    slots[1 :: max(2, tokens // 3)] = -1
    before = qkv.clone()
    results = []
    for module in (reference, kernels):
        query = torch.empty(tokens, num_query, head_dim, dtype=dtype, device=device)
        caches = [torch.zeros(num_blocks, 16, num_kv, head_dim, device=device).to(cache_dtype) for _ in "kv"]
        scales = [torch.zeros(num_blocks, 16, num_kv, device=device) for _ in "kv"]
        quantized = cache_dtype.itemsize == 1
        module.qk_norm_rope_cache(
            qkv,
            query,
            positions,
            cos_sin,
            *weights,
            1e-6,
            *caches,
            slots,
            *(scales if quantized else (None, None)),
            interleaved,
        )
        wide = [c.float() * s.unsqueeze(-1) if quantized else c.float() for c, s in zip(caches, scales, strict=True)]
        results.append([query.float(), *wide])
    assert torch.equal(qkv, before)
    limit = 0.08 if cache_dtype.itemsize == 1 else TOLERANCE[dtype]
    limits = (TOLERANCE[dtype], limit, limit)
    return max(error(got, expected, top) for got, expected, top in zip(results[1], results[0], limits, strict=True))


def check_attention(
    device: str,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = BF16,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
    padding: int = 0,
) -> float:
    """Decodes first; seq_len 0 is a padding request. Slots that belong to nobody hold NaN; `padding` rows follow."""
    reference, kernels = ops("attention")
    num_heads, num_kv_heads = heads
    num_decodes = len(list(itertools.takewhile(lambda n: n == 1, query_lens)))
    tokens = sum(query_lens)
    widest = max(1, *(-(-n // block_size) for n in seq_lens))
    num_blocks = widest * len(seq_lens) + 1
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    table = order[1:].view(len(seq_lens), widest).to(device)
    exists = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for r, length in enumerate(seq_lens):
        for block, start in zip(table[r].tolist(), range(0, length, block_size), strict=False):
            exists[block, : length - start] = True
    exists = exists.to(device)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    scales: list[torch.Tensor | None] = [None, None]
    if cache_dtype is None:
        caches = [random(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2)]
        for cache in caches:
            cache[~exists] = float("nan")
    else:
        caches = [random(*shape, dtype=FP32, device=device, scale=50, seed=s).to(cache_dtype) for s in (1, 2)]
        scales = [torch.rand(shape[:-1], generator=torch.Generator().manual_seed(s)).to(device) / 25 for s in (1, 2)]
        for cache, scale in zip(caches, scales, strict=True):
            cache.view(torch.uint8)[~exists] = 0x7F if cache_dtype == FN else 0x80
            scale[~exists] = float("nan")
    query = random(tokens + padding, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    query = query[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=device)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    results = []
    for module in (reference, kernels):
        output = torch.full((tokens + padding, num_heads, head_dim), 7.0, dtype=dtype, device=device)
        module.paged_attention(
            query,
            *caches,
            starts,
            lens,
            table,
            output,
            head_dim**-0.5,
            num_decodes,
            max(query_lens),
            max(seq_lens),
            window,
            *scales,
        )
        assert (output[tokens:] == 7.0).all(), "rows past the last request were written"
        results.append(output[:tokens])
    # Probabilities are rounded to the input's type before their product with the values.
    return error(results[1], results[0])


def check_route_experts(
    device: str, tokens: int, num_experts: int, choices: int, renormalize: bool, dtype: torch.dtype
) -> float:
    reference, kernels = ops("routing")
    logits = random(tokens, 2 * num_experts, dtype=dtype, device=device, scale=3)[:, :num_experts]
    (got, ids), (expected, expected_ids) = (m.route_experts(logits, choices, renormalize) for m in (kernels, reference))
    assert ids.dtype == torch.int32
    assert all(len(set(row)) == choices for row in ids.tolist()), "an expert was chosen twice"
    # Of equal logits the reference takes any.
    assert torch.equal(logits.gather(1, ids.long()), logits.gather(1, expected_ids.long()))
    return error(got, expected, 1e-5)


def check_order_by_expert(device: str, pairs: int, num_experts: int) -> float:
    from atom.kernels.triton.routing import order_by_expert

    ids = torch.randint(0, num_experts, (pairs, 1), device=device, dtype=torch.int32)
    order, offsets = order_by_expert(ids, num_experts)
    assert torch.equal(order.long(), ids[:, 0].sort(stable=True).indices)
    assert offsets.tolist() == [0, *torch.bincount(ids[:, 0], minlength=num_experts).cumsum(0).tolist()]
    return 0.0


def check_fused_experts(
    device: str, tokens: int, size: int, intermediate: int, num_experts: int, choices: int, dtype: torch.dtype
) -> float:
    reference, kernels = ops("moe")
    x = random(tokens, size, dtype=dtype, device=device)
    w13 = random(num_experts, 2 * intermediate, size, dtype=dtype, device=device, scale=size**-0.5)
    w2 = random(num_experts, size, intermediate, dtype=dtype, device=device, scale=intermediate**-0.5)
    scores = random(tokens, num_experts, dtype=FP32, device=device, scale=2)
    scores[:, 0] -= 100  # an expert without tokens
    weights, ids = scores.softmax(-1).topk(choices)
    got, expected = (m.fused_experts(x, w13, w2, weights, ids) for m in (kernels, reference))
    return error(got, expected, {FP32: 1e-4, FP16: 5e-3, BF16: 2e-2}[dtype])


def check_sample(
    device: str,
    rows: int,
    vocab_size: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    coarse: bool = False,
) -> float:
    """temperature None: another one in each row, 0 among them. coarse: few values, many ties. Filters vary by row."""
    reference, kernels = ops("sampling")
    logits = random(rows, vocab_size, dtype=FP32, device=device, scale=3, seed=rows)
    if coarse:
        logits = (logits * 2).round() / 2
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(rows, generator=generator).to(device)
    heat = torch.full((rows,), 1.0 if temperature is None else temperature, device=device)
    if temperature is None:
        heat = torch.arange(rows, device=device) % 4 * 0.5
    turn = torch.arange(rows, device=device) % 3  # every third row is without each filter
    k = None if top_k is None else torch.where(turn == 0, vocab_size, top_k).to(torch.int32)
    p = None if top_p is None else torch.where(turn == 1, 1.0, top_p).float()
    floor = None if min_p is None else torch.where(turn == 2, 0.0, min_p).float()
    got = kernels.sample(logits.clone(), heat, k, p, floor, uniform)
    return _same_tokens(reference, got, logits, heat, (k, p, floor), uniform)


def _same_tokens(
    reference: Any,
    got: torch.Tensor,
    logits: torch.Tensor,
    heat: torch.Tensor,
    filters: Sequence[torch.Tensor | None],
    uniform: torch.Tensor,
) -> float:
    """The share of rows whose tokens differ from the reference's, all for a reason."""
    expected = reference.sample(logits.clone(), heat, *filters, uniform)
    assert got.dtype == torch.int64
    assert got.shape == expected.shape
    # Sums are rounded differently: where tokens differ, the number must lie at the border of the two.
    for row in (got != expected).nonzero().flatten().tolist():
        assert heat[row] > 0, f"row {row} is greedy"
        one = [None if f is None else f[row : row + 1].cpu().expand(2) for f in filters]
        near = torch.stack([uniform[row] - 1e-5, uniform[row] + 1e-5]).clamp(0, 1 - 1e-7).cpu()
        around = reference.sample(logits[row : row + 1].cpu().expand(2, -1), heat[row].cpu().expand(2), *one, near)
        assert int(got[row]) in around.tolist(), f"row {row}: {int(got[row])} instead of {int(expected[row])}"
    return float((got != expected).float().mean())


def check_sample_distribution(device: str, kind: str, vocab_size: int, filters: str, capacity: int = 0) -> float:
    """Rows of one kind, each with other filters and another temperature, among others and alone.

    filters: which of k, p and m(in_p) there are; capacity: room for candidates, 0 = as it is.
    """
    reference, kernels = ops("sampling")
    rows = 8
    x = random(rows, vocab_size, dtype=FP32, device="cpu", seed=3)
    logits = {
        "normal": lambda: x * 3,
        "bf16": lambda: x.bfloat16().float(),
        "equal": lambda: torch.full_like(x, 5.0),
        "two values": lambda: (x > 1).float() * 3,
        "sorted": lambda: x.sort(-1).values * 3,
        "outliers": lambda: x.masked_fill(x > 1, -1e9),
        "masked": lambda: x.masked_fill(x < 1, -math.inf),
        "huge": lambda: x * 1e38,
        "spike": lambda: torch.where(torch.arange(vocab_size) == 77, 30.0, 0.0).expand(rows, -1).clone(),
    }[kind]()
    logits = logits.to(device)
    heat = torch.tensor([1, 0.7, 0.3, 2.0, 1.5, 50.0, 1, 0.0], device=device)
    large = vocab_size // 2
    k = torch.tensor([1, 20, 50, 1000, vocab_size - 1, vocab_size, large, 3], dtype=torch.int32, device=device)
    p = torch.tensor([0.9013, 0.9533, 0.0, 0.5033, 0.9991, 0.99999, 1.0, 0.5], device=device)
    floor = torch.tensor([0.0, 0.01, 0.05, 0.001, 0.0, 0.5, 0.1, 1.0], device=device)
    chosen = [x if name in filters else None for name, x in (("k", k), ("p", p), ("m", floor))]
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(2)).to(device)
    usual = kernels._CAPACITY
    kernels._CAPACITY = capacity or usual
    try:
        got = kernels.sample(logits.clone(), heat, *chosen, uniform)
        one = slice(4, 5)
        alone = kernels.sample(logits[one], heat[one], *[x if x is None else x[one] for x in chosen], uniform[one])
        assert alone.tolist() == got[one].tolist(), "a row depends on the others"
    finally:
        kernels._CAPACITY = usual
    return _same_tokens(reference, got, logits, heat, chosen, uniform)


def check_sample_undefined(device: str) -> float:
    """Rows without a distribution are greedy; -inf logits are never chosen."""
    reference, kernels = ops("sampling")
    logits = random(6, 5000, dtype=FP32, device=device)
    logits[0] = -math.inf
    logits[1, 4500] = math.nan
    logits[2, [7, 4999]] = math.inf
    logits[3] = -math.inf
    logits[3, 4321] = -5.0
    logits[4, 17] = 90.0
    logits[5] = 0.0
    ones = torch.ones(6, device=device)
    uniform = torch.tensor([0.5, 0.5, 0.5, 0.999, 0.999, 1 - 2**-24], device=device)
    for filters in ((None, None, None), (ones.int() * 3, ones * 0.9, ones * 0.01)):
        got = kernels.sample(logits, ones, *filters, uniform)
        assert got.tolist() == reference.sample(logits, ones, *filters, uniform).tolist()
    return 0.0


Case = tuple[str, Callable[..., float], tuple[Any, ...], dict[str, Any]]


def _case(name: str, check: Callable[..., float], *args: Any, **kwargs: Any) -> Case:
    return name, check, args, kwargs


def small_cases() -> list[Case]:
    """For the interpreter: each odd shape once."""
    attention = "paged_attention"
    quantized = [
        _case(name, check, *args)
        for name, check in QUANT_CHECKS.items()
        for args in (
            ((1, 64), BF16, FN, None),
            ((5, 576), FP16, FNUZ, None),
            ((3, 1000), FP32, INT8, None),
            ((1, 100), BF16, FN, 128),
            ((5, 1100), FP32, FN, 128),
            ((3, 384), BF16, FNUZ, 128),
            ((4, 2112), FP16, INT8, 128),
            ((4099, 24), BF16, FN, 16),
        )
    ]
    return [
        *quantized,
        _case("rms_norm", check_rms_norm, (1, 64), BF16, False),
        _case("rms_norm", check_rms_norm, (3, 100), FP32, True),
        _case("rms_norm", check_rms_norm, (2, 4097), FP16, False),
        _case("rms_norm", check_rms_norm, (5, 3, 80), BF16, True),
        _case("rms_norm", check_rms_norm, (0, 64), BF16, False),
        _case("add_rms_norm", check_add_rms_norm, (1, 576), BF16),
        _case("add_rms_norm", check_add_rms_norm, (5, 1000), FP32),
        _case("silu_and_mul", check_silu_and_mul, (1, 64), BF16),
        _case("silu_and_mul", check_silu_and_mul, (3, 1500), FP32),
        _case("linear", check_linear, 1, 64, 100, BF16, True, False),
        _case("linear", check_linear, 1, 1000, 33, FP32, False, True),
        _case("linear", check_linear, 1, 300, 40, FP16, False, False),
        _case("linear", check_linear, 2, 64, 40, BF16, True, True),
        _case("linear", check_linear, 16, 100, 33, FP32, True, False),
        _case("linear", check_linear, 17, 64, 40, BF16, True, False),
        _case("linear", check_gemm, 33, 72, 70, FP32),
        _case("linear", check_gemm, 150, 64, 100, BF16),
        _case("linear_silu_and_mul", check_linear_silu_and_mul, 1, 64, 100, BF16),
        _case("linear_silu_and_mul", check_linear_silu_and_mul, 1, 320, 48, FP32),
        _case("linear_silu_and_mul", check_linear_silu_and_mul, 3, 64, 100, BF16),
        _case("linear_silu_and_mul", check_linear_silu_and_mul, 7, 72, 20, FP32),
        _case("linear_silu_and_mul", check_linear_silu_and_mul, 20, 64, 100, BF16),
        _case("quant_linear", check_quant_linear, 1, 64, 100, BF16, FN, None),
        _case("quant_linear", check_quant_linear, 5, 200, 33, FP32, FN, 128),
        _case("quant_linear", check_quant_linear, 17, 256, 70, BF16, FNUZ, 128),
        _case("quant_linear", check_quant_linear, 70, 300, 65, FP16, FNUZ, None),
        _case("quant_linear", check_quant_linear, 150, 128, 130, BF16, FN, 128),
        _case("rotary_embedding_", check_rotary, 1, (4, 2), 64, 64, False, BF16),
        _case("rotary_embedding_", check_rotary, 5, (9, 3), 80, 32, False, FP32),
        _case("rotary_embedding_", check_rotary, 3, (16, 1), 128, 128, True, BF16),
        _case("store_kv", check_store_kv, 1, 1, 64, 16, BF16, BF16),
        _case("store_kv", check_store_kv, 7, 9, 96, 1, FP32, FP32),
        _case("store_kv", check_store_kv, 9, 2, 80, 16, FP16, FP16),
        _case("store_kv", check_store_kv, 9, 3, 128, 16, BF16, FN),
        _case("store_kv", check_store_kv, 5, 2, 64, 32, BF16, FNUZ),
        _case("qk_norm_rope_cache", check_qk_norm_rope_cache, 1, (16, 8), 128, 128, False, True, BF16, BF16),
        _case("qk_norm_rope_cache", check_qk_norm_rope_cache, 5, (9, 3), 64, 64, False, False, BF16, BF16),
        _case("qk_norm_rope_cache", check_qk_norm_rope_cache, 4, (5, 1), 80, 32, False, True, FP32, FP32),
        _case("qk_norm_rope_cache", check_qk_norm_rope_cache, 3, (4, 2), 96, 96, True, False, FP16, FP16),
        _case("qk_norm_rope_cache", check_qk_norm_rope_cache, 6, (8, 2), 128, 128, False, True, BF16, FN),
        _case("qk_norm_rope_cache", check_qk_norm_rope_cache, 4, (4, 4), 64, 32, True, False, FP32, FNUZ),
        # one token; block borders; many splits
        _case(attention, check_attention, [1], [1], (4, 4), 64, 16),
        _case(attention, check_attention, [1, 1, 1], [16, 17, 0], (4, 1), 80, 16, FP32),
        _case(attention, check_attention, [1, 1], [300, 65], (14, 2), 64, 16, FP16, padding=2),
        _case(attention, check_attention, [1, 1], [700, 33], (16, 1), 128, 64),
        _case(attention, check_attention, [1], [150], (2, 2), 256, 1, FP32),
        _case(attention, check_attention, [1, 1], [200, 40], (3, 3), 96, 16, window=50),
        _case(attention, check_attention, [1], [130], (4, 2), 128, 32, BF16, FN),
        _case(attention, check_attention, [1, 1, 1], [300, 0, 70], (3, 1), 64, 16, FP32, FN),
        _case(attention, check_attention, [1, 1], [90, 17], (8, 2), 80, 16, FP16, FN, window=50),
        _case(attention, check_attention, [1], [100], (7, 1), 128, 16, BF16, FN),
        _case(attention, check_attention, [1, 1, 1], [90, 0, 33], (4, 2), 64, 8, BF16, FN),
        # parts merged by the last program of few, and by a kernel of their own
        _case(attention, check_attention, [1], [2000], (2, 1), 256, 16),
        _case(attention, check_attention, [1], [700], (2, 1), 64, 16, BF16, FN),
        _case(attention, check_attention, [1] * 20, [150] * 19 + [0], (4, 2), 64, 16),
        # whole prompts, chunks, both with decodes
        _case(attention, check_attention, [64], [64], (2, 2), 64, 16, FP32),
        _case(attention, check_attention, [2, 3, 19], [2, 70, 19], (6, 2), 64, 16, FP32, padding=3),
        _case(attention, check_attention, [1, 1, 17, 40], [33, 0, 90, 40], (8, 1), 128, 16),
        _case(attention, check_attention, [5, 0, 20], [100, 0, 0], (7, 1), 80, 1, FP16),
        _case(attention, check_attention, [1, 70], [60, 80], (4, 2), 64, 32, FP32, window=20),
        _case(attention, check_attention, [1, 30], [60, 80], (4, 4), 192, 64, BF16, FN),
        _case(attention, check_attention, [90], [90], (2, 1), 256, 16),
        _case("fused_experts", check_fused_experts, 1, 64, 32, 4, 2, BF16),
        _case("fused_experts", check_fused_experts, 37, 96, 80, 6, 2, FP32),
        _case("fused_experts", check_fused_experts, 20, 64, 64, 40, 8, BF16),
        _case("fused_experts", check_fused_experts, 1, 72, 40, 40, 8, FP32),
        _case("fused_experts", check_fused_experts, 5, 160, 48, 60, 3, BF16),
        _case("route_experts", check_route_experts, 1, 128, 8, True, BF16),
        _case("route_experts", check_route_experts, 5, 60, 4, False, FP32),
        _case("route_experts", check_route_experts, 3, 8, 8, True, FP16),
        _case("order_by_expert", check_order_by_expert, 37, 6),
        _case("order_by_expert", check_order_by_expert, 5000, 3),
        _case("sample", check_sample, 5, 9000, None, None, None, None),
        _case("sample", check_sample, 6, 5000, 0.8, 50, None, None),
        _case("sample", check_sample, 6, 5000, 1.0, None, 0.9, None),
        _case("sample", check_sample, 6, 5000, 1.3, None, None, 0.05),
        _case("sample", check_sample, 9, 5000, None, 40, 0.8, 0.01, coarse=True),
        _case("sample", check_sample, 6, 37, 1.0, 1, 0.0, None, coarse=True),
        _case("sample", check_sample_undefined),
        _case("sample", check_sample_distribution, "normal", 5000, "kp"),
        _case("sample", check_sample_distribution, "bf16", 5000, "pm"),
        _case("sample", check_sample_distribution, "normal", 5000, "kpm", capacity=64),
        _case("sample", check_sample_distribution, "equal", 5000, "kp", capacity=64),
        _case("sample", check_sample_distribution, "outliers", 5000, "p"),
        _case("sample", check_sample_distribution, "huge", 3000, "k"),
    ]


def full_cases(fp8: torch.dtype = FN) -> list[Case]:
    """The grid for a GPU (or `-m slow`): every head dim, group, block size and type that models have."""
    foreign = FN if fp8 == FNUZ else FNUZ
    cases = [c for c in small_cases() if foreign not in c[2]]
    for tokens, size, dtype in itertools.product((1, 17, 5000), (128, 576, 4096, 5120, 16384), (BF16, FP16, FP32)):
        if tokens * size > 3e7 or (dtype != BF16 and size == 5120):
            continue
        cases.append(_case("rms_norm", check_rms_norm, (tokens, size), dtype, size == 576))
        cases.append(_case("add_rms_norm", check_add_rms_norm, (tokens, size), dtype))
        cases.append(_case("silu_and_mul", check_silu_and_mul, (tokens, size), dtype))
    quantized_shapes = itertools.product((1, 17, 5000), (64, 576, 1000, 4096, 12288), (BF16, FP16, FP32))
    for (tokens, size, dtype), to, group in itertools.product(quantized_shapes, (fp8, INT8), (None, 128)):
        if tokens * size < 3e7 and (dtype == BF16 or tokens == 17):
            for name, check in QUANT_CHECKS.items():
                cases.append(_case(name, check, (tokens, size), dtype, to, group))
    for tokens, (size, rows), dtype in itertools.product(
        (1, 2, 16), ((1024, 4096), (3072, 1024), (4096, 6144), (576, 1536), (12288, 520)), (BF16, FP16, FP32)
    ):
        cases.append(_case("linear", check_linear, tokens, size, rows, dtype, rows == 1536, rows == 520))
        cases.append(_case("linear_silu_and_mul", check_linear_silu_and_mul, tokens, size, rows, dtype))
    cases.append(_case("linear", check_linear, 40, 1024, 5000, BF16, False, True))
    for tokens, (size, rows) in itertools.product((17, 64, 65, 300, 2000), ((1024, 4096), (576, 1536), (4096, 520))):
        cases.append(_case("linear", check_gemm, tokens, size, rows, BF16))
    for tokens, (size, rows), group in itertools.product(
        (1, 16, 17, 64, 65, 300, 2000), ((1024, 4096), (576, 1537), (12288, 520)), (None, 128)
    ):
        cases.append(_case("quant_linear", check_quant_linear, tokens, size, rows, BF16, fp8, group))
    for tokens, dtype in itertools.product((1, 300), (BF16, FP32)):
        cases.append(_case("rms_norm", check_rms_norm, (tokens, 32, 128), dtype, True))
        for head_dim, rotary_dim, interleaved in (
            (64, 64, False),
            (80, 32, False),
            (128, 128, True),
            (256, 256, False),
        ):
            cases.append(
                _case("rotary_embedding_", check_rotary, tokens, (32, 8), head_dim, rotary_dim, interleaved, dtype)
            )
        for heads, head_dim, norm, cache_dtype in itertools.product(
            ((16, 8), (32, 4), (14, 2)), (64, 128, 256), (False, True), (dtype, fp8)
        ):
            shape = (tokens, heads, head_dim, head_dim, False, norm, dtype, cache_dtype)
            cases.append(_case("qk_norm_rope_cache", check_qk_norm_rope_cache, *shape))
        for head_dim, block_size in ((64, 1), (80, 16), (128, 16), (256, 64)):
            for cache_dtype in (dtype, fp8):
                cases.append(_case("store_kv", check_store_kv, tokens, 8, head_dim, block_size, dtype, cache_dtype))
    decodes = ([1] * 5, [1, 4097, 0, 300, 1000])
    many = ([1] * 40, [(37 * i) % 700 for i in range(40)])
    prompts = ([2, 700, 129, 1], [2, 1500, 129, 65])
    mixed = ([1, 1, 1, 300, 64], [1, 2000, 77, 300, 640])
    drafts = ([1, 3, 3, 2], [900, 1000, 3, 64])
    for lens, (head_dim, block_size) in itertools.product(
        (decodes, prompts, mixed), ((64, 16), (80, 1), (96, 32), (128, 16), (128, 1), (192, 64), (256, 16))
    ):
        cases.append(_case("paged_attention", check_attention, *lens, (8, 2), head_dim, block_size))
    for lens, heads in itertools.product((decodes, many, mixed, drafts), ((8, 8), (14, 2), (32, 8), (16, 1), (24, 1))):
        cases.append(_case("paged_attention", check_attention, *lens, heads, 128, 16))
    for lens, head_dim in itertools.product((decodes, mixed), (64, 128, 256)):
        cases.append(_case("paged_attention", check_attention, *lens, (8, 2), head_dim, 16, FP16))
        cases.append(_case("paged_attention", check_attention, *lens, (8, 2), head_dim, 16, FP32))
        cases.append(_case("paged_attention", check_attention, *lens, (8, 2), head_dim, 16, BF16, fp8))
        cases.append(_case("paged_attention", check_attention, *lens, (8, 2), head_dim, 16, window=333))
    # float8 caches have a kernel of their own on NVIDIA GPUs: by heads of a group, sizes, types and windows.
    for lens, (heads, head_dim, block_size, dtype) in itertools.product(
        (decodes, many, mixed),
        (
            ((16, 8), 128, 16, BF16), ((16, 8), 64, 32, BF16), ((8, 8), 128, 64, FP16), ((32, 4), 128, 16, BF16),
            ((32, 4), 64, 16, FP16), ((12, 1), 128, 32, BF16), ((40, 2), 64, 16, BF16), ((16, 8), 128, 8, BF16),
        ),
    ):  # fmt: skip
        cases.append(_case("paged_attention", check_attention, *lens, heads, head_dim, block_size, dtype, fp8))
        cases.append(
            _case("paged_attention", check_attention, *lens, heads, head_dim, block_size, dtype, fp8, window=100)
        )
    for tokens, dtype in itertools.product((1, 16, 200, 3000), (BF16, FP16, FP32)):
        if dtype == BF16 or tokens <= 200:
            cases.append(_case("fused_experts", check_fused_experts, tokens, 512, 384, 8, 2, dtype))
    for tokens, dtype in itertools.product((1, 3, 8, 9), (BF16, FP16, FP32)):  # on both sides of the few
        cases.append(_case("fused_experts", check_fused_experts, tokens, 2048, 768, 128, 8, dtype))
        cases.append(_case("route_experts", check_route_experts, tokens, 128, 8, True, dtype))
    cases.append(_case("fused_experts", check_fused_experts, 700, 1024, 256, 128, 8, BF16))
    cases.append(_case("route_experts", check_route_experts, 3000, 256, 8, False, BF16))
    for pairs, num_experts in ((8, 128), (2048, 128), (65536, 128), (100_000, 8)):
        cases.append(_case("order_by_expert", check_order_by_expert, pairs, num_experts))
    for rows, vocab_size in ((1, 32000), (7, 151936), (64, 262144), (256, 49152)):
        for k, p, floor in (
            (None, None, None),
            (50, None, None),
            (None, 0.95, None),
            (None, None, 0.05),
            (40, 0.9, 0.02),
        ):
            cases.append(_case("sample", check_sample, rows, vocab_size, None, k, p, floor))
        cases.append(_case("sample", check_sample, rows, vocab_size, 0.7, 1000, 0.99, None, coarse=True))
    kinds = ("normal", "bf16", "equal", "two values", "sorted", "outliers", "masked", "huge", "spike")
    for kind, filters, capacity in itertools.product(kinds, ("k", "p", "kp", "pm", "kpm"), (0, 64)):
        cases.append(_case("sample", check_sample_distribution, kind, 151936, filters, capacity))
    return cases


def case_id(case: Case) -> str:
    name, _, args, kwargs = case
    text = [str(a).replace("torch.", "").replace(" ", "") for a in args]
    text += [f"{key}={value}" for key, value in kwargs.items()]
    return "-".join([name, *text])[:120]
