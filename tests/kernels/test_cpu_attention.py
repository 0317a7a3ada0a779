"""The C++ attention and cache kernels against the references, and against themselves: alone, batched, chunked."""

import pytest
import torch

from atom.kernels import cpu
from atom.kernels.torch import attention as reference
from atom.kernels.torch import kv_cache as reference_cache
from atom.kernels.torch import qkv as reference_qkv

reason = cpu.unavailable_reason()
if reason:
    pytest.skip(reason, allow_module_level=True)

from atom.kernels.cpu.attention import paged_attention  # noqa: E402
from atom.kernels.cpu.kv_cache import store_kv  # noqa: E402
from atom.kernels.cpu.qkv import qk_norm_rope_cache  # noqa: E402

FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


class Batch:
    """Requests with `contexts` tokens in a shuffled paged cache, the last `queries` of which are asked now."""

    def __init__(self, contexts, queries, heads, kv_heads, dim, block_size, dtype, fp8=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.contexts, self.queries, self.block_size = contexts, queries, block_size
        blocks = [-(-c // block_size) for c in contexts]
        order = torch.randperm(sum(blocks) + 3, generator=g).int()
        self.block_table = torch.full((len(contexts), max(blocks) + 1), -1, dtype=torch.int32)
        used = 0
        for r, n in enumerate(blocks):
            self.block_table[r, :n] = order[used : used + n]
            used += n
        shape = (len(order), block_size, kv_heads, dim)
        # The kernels keep a cache in an order of their own. What no request owns is NaN: it must not leak.
        cache_dtype = FLOAT8 if fp8 else dtype
        self.cache, self.reference_cache = (
            [
                *(torch.full(shape, float("nan")).to(cache_dtype) for _ in range(2)),
                *(torch.full(shape[:3], float("nan")) if fp8 else None for _ in range(2)),
            ]
            for _ in range(2)
        )
        for r, c in enumerate(contexts):
            self.store(r, *(torch.randn(c, kv_heads, dim, generator=g).to(dtype) for _ in range(2)))
        total = sum(queries)
        # The query is a view of a wider tensor, as after a fused projection.
        self.fused = torch.randn(total, heads + 2 * kv_heads, dim, generator=g).to(dtype)
        self.query = self.fused[:, :heads]
        self.scale = dim**-0.5

    def store(self, r, key, value):
        for function, cache in ((store_kv, self.cache), (reference_cache.store_kv, self.reference_cache)):
            function(key, value, *cache[:2], self.slots(r), *cache[2:])

    def slots(self, r):
        position = torch.arange(self.contexts[r])
        return self.block_table[r, position // self.block_size].long() * self.block_size + position % self.block_size

    def attend(self, function, rows=None, contexts=None, table_rows=None, window=0, dtype=None):
        """rows: per request (first, end) rows of the flat query; all by default."""
        if rows is None:
            starts = [sum(self.queries[:r]) for r in range(len(self.queries))]
            rows = [(s, s + n) for s, n in zip(starts, self.queries, strict=True)]
            contexts, table_rows = self.contexts, range(len(self.contexts))
        query = torch.cat([self.fused[a:b] for a, b in rows])[:, : self.query.shape[1]]
        lengths = [b - a for a, b in rows]
        *caches, k_scale, v_scale = self.cache if function is paged_attention else self.reference_cache
        if dtype:
            query, caches = query.to(dtype), [c.to(dtype) for c in caches]
        output = torch.full(query.shape, float("nan"), dtype=query.dtype)
        start = torch.tensor([0, *lengths]).cumsum(0).int()
        decodes = next((i for i, n in enumerate(lengths) if n != 1), len(lengths))
        function(
            query, *caches, start, torch.tensor(contexts).int(), self.block_table[list(table_rows)], output,
            self.scale, decodes, max(lengths), max(contexts), window, k_scale, v_scale,
        )  # fmt: skip
        return output


def assert_near_reference(batch, window=0, tolerance=None):
    got = batch.attend(paged_attention, window=window)
    exact = batch.attend(reference.paged_attention, window=window, dtype=torch.float64)
    error = (got.double() - exact.double()).abs().max() / exact.abs().max()
    assert error < (tolerance or TOLERANCE[got.dtype]), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("fp8", [False, True])
def test_mixed_batch(dtype, block_size, fp8):
    contexts, queries = [1, 15, 16, 17, 63, 65, 300, 2, 50, 130, 64], [1, 1, 1, 1, 1, 1, 1, 2, 50, 33, 64]
    assert_near_reference(Batch(contexts, queries, 9, 3, 64, block_size, dtype, fp8))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(1, 1, 64), (8, 8, 80), (16, 1, 128), (14, 2, 96), (4, 1, 256), (32, 4, 40), (3, 1, 17), (80, 1, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(heads, kv_heads, dim, dtype):
    assert_near_reference(Batch([40, 129, 70], [1, 1, 70], heads, kv_heads, dim, 16, dtype))


@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sliding_window(window, dtype):
    assert_near_reference(Batch([1, 200, 390, 90, 260], [1, 1, 1, 90, 30], 6, 2, 32, 16, dtype), window)


def test_window_reads_no_freed_block():
    batch = Batch([400, 300], [1, 20], 4, 2, 64, 16, torch.float32)
    expected = batch.attend(paged_attention, window=64)
    batch.block_table[0, : (400 - 64) // 16] = 10**9
    batch.block_table[1, : (300 - 20 - 64) // 16] = -(10**9)
    assert torch.equal(batch.attend(paged_attention, window=64), expected)


def test_padding_requests_give_zeros():
    batch = Batch([20, 0, 0], [1, 1, 1], 4, 2, 64, 16, torch.bfloat16)
    out = batch.attend(paged_attention)
    assert out[0].abs().sum() > 0
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_alone_batched_and_chunked(dtype, window, threads):
    contexts = [700, 130, 64, 300]
    batch = Batch(contexts, contexts, 9, 3, 64, 16, dtype)
    torch.set_num_threads(threads)
    whole = batch.attend(paged_attention, window=window)
    start = 0
    for r, context in enumerate(contexts):
        rows = whole[start : start + context]
        for size in (1, 37, context):
            for end in range(1, context + 1, 61) if size == 1 else range(size, context + 1, size):
                one = batch.attend(paged_attention, [(start + end - size, start + end)], [end], [r], window)
                assert torch.equal(one, rows[end - size : end]), (r, size, end)
        start += context
    # All requests' decodes of one step.
    ends = [start + c for start, c in zip((0, 700, 830, 894), contexts, strict=True)]
    batched = batch.attend(paged_attention, [(e - 1, e) for e in ends], contexts, range(4), window)
    assert torch.equal(batched, whole[[e - 1 for e in ends]])


def test_large_scores_and_equal_keys():
    batch = Batch([200], [200], 2, 1, 64, 16, torch.float32)
    batch.fused *= 100  # scores in the hundreds, whose float32 errors the exponential shows
    assert_near_reference(batch, tolerance=1e-4)
    batch.cache[0][:] = batch.reference_cache[0][:] = 1.0
    assert_near_reference(batch)


def in_order_of_slots(k, v, dtype):
    """[blocks, block_size, heads, dim] of caches that may be tiled (csrc/tiled_cache.h)."""
    blocks, block_size, heads, dim = k.shape
    if cpu.extension().isa() != "amx_bf16" or dtype != torch.bfloat16 or block_size % 16 or dim % 32:
        return k, v
    # torch can't permute float8: bytes, or pairs of them.
    k, v = (c.view(torch.uint8 if c.element_size() == 1 else torch.int16) for c in (k, v))
    k = k.view(blocks, -1, heads, dim // 2, 16, 2).permute(0, 1, 4, 2, 3, 5)
    v = v.view(blocks, -1, heads, dim // 16, 8, 16, 2).permute(0, 1, 4, 6, 2, 3, 5)
    return k.reshape(blocks, block_size, heads, dim), v.reshape(blocks, block_size, heads, dim)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_projection_fills_the_cache_that_attention_reads(norm, dtype):
    tokens, heads, kv_heads, dim = 40, 6, 2, 64
    g = torch.Generator().manual_seed(3)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=g).to(dtype)
    weights = [torch.rand(dim, generator=g).to(dtype) if norm else None for _ in range(2)]
    cos_sin, slots = torch.randn(64, dim, generator=g), torch.arange(tokens) + 16
    table, start = torch.arange(1, 4).int().unsqueeze(0), torch.tensor([0, tokens]).int()
    outputs = []
    for prepare, attend in (
        (qk_norm_rope_cache, paged_attention),
        (reference_qkv.qk_norm_rope_cache, reference.paged_attention),
    ):
        k, v = (torch.zeros(4, 16, kv_heads, dim, dtype=dtype) for _ in range(2))
        query, output = (torch.empty(tokens, heads, dim, dtype=dtype) for _ in range(2))
        prepare(qkv, query, torch.arange(tokens), cos_sin, *weights, 1e-5, k, v, slots)
        attend(query, k, v, start, torch.tensor([tokens]).int(), table, output, dim**-0.5, 0, tokens, tokens)
        outputs.append(output.double())
    error = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
    assert error < 2 * TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("block_size", "dim"), [(1, 64), (16, 80), (64, 17), (16, 64), (32, 96)])
def test_store_kv(dtype, fp8, block_size, dim):
    tokens, heads, blocks = 150, 3, 200
    g = torch.Generator().manual_seed(1)
    fused = torch.randn(tokens, heads * 4, dim, generator=g).to(dtype)
    fused[3] = 0
    fused[4] *= 1e-6
    fused[5] *= 1e4
    key, value = fused[:, 2 : 2 + heads], fused[:, heads + 2 : 2 * heads + 2]
    slots = torch.randperm(blocks * block_size, generator=g)[:tokens]
    slots[[0, 7, 149]] = -1
    results = []
    for function in (store_kv, reference_cache.store_kv):
        k, v = (torch.zeros(blocks, block_size, heads, dim).to(FLOAT8 if fp8 else dtype) for _ in range(2))
        scales = [torch.zeros(blocks, block_size, heads) if fp8 else None for _ in range(2)]
        function(key, value, k, v, slots, *scales)
        if function is store_kv:
            k, v = in_order_of_slots(k, v, dtype)
        results.append((k, v, *scales))
    for got, expected in zip(*results, strict=True):
        if got is not None:
            assert torch.equal(got.contiguous().view(torch.uint8), expected.view(torch.uint8))


def test_every_float8_rounds_as_torch_does():
    # One head a row; the amax of 448 makes the scale 1, so that the rest is rounded as it is.
    exact = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    exact = exact[~exact.isnan()].sort().values.unique()
    middle = (exact[1:] + exact[:-1]) / 2
    points = torch.cat([exact, middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(-1e9))])
    rows = torch.nn.functional.pad(points, (0, -len(points) % 15)).view(-1, 15)
    key = torch.cat([rows, torch.full((len(rows), 1), 448.0)], 1).unsqueeze(1).contiguous()
    k, v = (torch.zeros(len(rows), 1, 1, 16).to(FLOAT8) for _ in range(2))
    scales = [torch.zeros(len(rows), 1, 1) for _ in range(2)]
    store_kv(key, key, k, v, torch.arange(len(rows)), *scales)
    assert (scales[0] == 1).all()
    assert torch.equal(k.flatten().view(torch.uint8), key.flatten().to(FLOAT8).view(torch.uint8))
