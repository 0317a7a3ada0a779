"""The C++ dense layers against float64, and rows of a batch against the same rows alone, bit by bit."""

import pytest
import torch

from atom.kernels import cpu
from atom.kernels.torch import linear as reference
from atom.kernels.torch.sampling import greedy

reason = cpu.unavailable_reason()
if reason:
    pytest.skip(reason, allow_module_level=True)

from atom.kernels.cpu.linear import (  # noqa: E402
    linear,
    linear_argmax,
    linear_silu_and_mul,
    prepare_linear_weight,
    prepare_silu_linear_weight,
    rms_norm_linear,
    rms_norm_linear_silu_and_mul,
)
from atom.kernels.cpu.norm import add_rms_norm, rms_norm  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place, relative, and of float32 sums the accumulated error.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(m, n, k, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(s, generator=g) for s in ((m, k), (n, k), (n,)))
    return x.to(dtype), (w / k**0.5).to(dtype), b.to(dtype)


def assert_near(got, exact, dtype):
    allowed = exact.abs() * ROUNDING[dtype] + 2e-5
    assert ((got.double() - exact).abs() <= allowed).all(), ((got.double() - exact).abs() - allowed).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (1, 1), (15, 3), (17, 33), (200, 576), (33, 2050), (48, 2048)])
@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 13, 64, 130, 391])
def test_linear(m, n, k, dtype):
    x, w, b = make(m, n, k, dtype)
    prepared = prepare_linear_weight(w)
    exact = x.double() @ w.double().t()
    assert_near(linear(x, prepared, None, n), exact, dtype)
    assert_near(linear(x, prepared, b, n), exact + b.double(), dtype)
    logits = linear(x, prepared, b, n, out_float32=True)
    assert logits.dtype == torch.float32
    assert_near(logits, exact + b.double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (1, 7), (17, 33), (200, 576), (40, 2050)])
@pytest.mark.parametrize("m", [1, 6, 64, 130])
def test_linear_silu_and_mul(m, n, k, dtype):
    x, w, _ = make(m, 2 * n, k, dtype)
    got = linear_silu_and_mul(x, prepare_silu_linear_weight(w), n)
    assert got.dtype == dtype
    assert_near(got, reference.linear_silu_and_mul(x.double(), w.double(), n), dtype)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [576, 2306])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_rows_have_the_same_bits_alone(dtype, k, threads):
    x, w, b = make(260, 176, k, dtype)
    prepared, paired = prepare_linear_weight(w), prepare_silu_linear_weight(w)
    torch.set_num_threads(threads)
    whole, gated = linear(x, prepared, b, 176, True), linear_silu_and_mul(x, paired, 88)
    for size in (1, 2, 6, 7, 20, 64, 200):
        part = slice(260 - size - 1, 259)
        assert torch.equal(linear(x[part], prepared, b, 176, True), whole[part])
        assert torch.equal(linear_silu_and_mul(x[part], paired, 88), gated[part])


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize(("n", "k"), [(1056, 64), (1056, 2306), (1072, 96)])
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_larger_than_the_caches_have_the_same_bits(n, k, threads):
    x, w, _ = make(2037, 2 * n, k, torch.bfloat16)
    plain, paired = prepare_linear_weight(w[:n].contiguous()), prepare_silu_linear_weight(w)
    torch.set_num_threads(threads)
    whole, gated = linear(x, plain, None, n), linear_silu_and_mul(x, paired, n)
    logits = linear(x, plain, None, n, True)
    for rows in range(0, len(x), 300):
        part = slice(rows, rows + 300)
        assert torch.equal(linear(x[part], plain, None, n), whole[part])
        assert torch.equal(linear(x[part], plain, None, n, True), logits[part])
        assert torch.equal(linear_silu_and_mul(x[part], paired, n), gated[part])


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 5), (17, 33), (999, 64), (3000, 2306)])
@pytest.mark.parametrize("m", [1, 5, 17, 64, 700])
@pytest.mark.parametrize("threads", [1, 3])
def test_argmax_is_the_first_of_the_largest_results(m, n, k, dtype, threads):
    x, w, _ = make(m, n, k, dtype)
    w[n // 2 : n // 2 + n // 3] = w[: n // 3]  # each of these twice
    w[n // 3 : n // 2] /= 4
    w[n // 2 + n // 3 :] /= 4
    torch.set_num_threads(threads)

    def check(x, w):
        prepared = prepare_linear_weight(w)
        results = linear(x, prepared, None, n, True)
        chosen = linear_argmax(x, prepared, n)
        assert torch.equal(chosen, greedy(results))
        return chosen

    chosen = check(x, w)
    assert (chosen < n // 2).float().mean() > 0.9 or n < 20
    if dtype == torch.float16:
        return  # no infinity times zero below
    check(torch.zeros_like(x), w)  # all equal
    check(-x.abs() - 1, torch.full_like(w, torch.finfo(dtype).max))  # nothing but -inf
    x[m // 2] = float("nan")
    check(x, w)
    w[n - 1] = w[n // 2] = float("nan")
    assert (check(x.nan_to_num(), w) == n // 2).all()


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(176, 576), (34, 33), (1000, 40)])
@pytest.mark.parametrize("m", [0, 1, 3, 16, 17, 33, 64, 500])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_norm_within_a_layer_has_the_bits_of_one_before_it(m, n, k, dtype, threads):
    x, w, b = make(m, 2 * n, k, dtype)
    rows, norm_weight = make(m, 1, k, dtype, seed=1)[0], make(1, 1, k, dtype, seed=2)[0][0].abs()
    prepared, paired = prepare_linear_weight(w), prepare_silu_linear_weight(w)
    torch.set_num_threads(threads)
    for residual in (None, rows):
        total = residual
        y = rms_norm(x, norm_weight, 1e-5)
        if residual is not None:
            y, total = add_rms_norm(x.clone(), residual.clone(), norm_weight, 1e-5)
        for bias in (None, b):
            sums = residual if residual is None else residual.clone()
            got = rms_norm_linear(x, sums, norm_weight, 1e-5, prepared, bias, 2 * n)
            assert torch.equal(got, linear(y, prepared, bias, 2 * n))
            assert total is None or torch.equal(sums, total)
        sums = residual if residual is None else residual.clone()
        got = rms_norm_linear_silu_and_mul(x, sums, norm_weight, 1e-5, paired, n)
        assert torch.equal(got, linear_silu_and_mul(y, paired, n))
        assert total is None or torch.equal(sums, total)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_norm_within_a_layer_of_strided_rows(dtype):
    x, w, b = make(6, 40, 34, dtype)
    norm_weight = torch.full((34,), 0.5, dtype=dtype)
    wide = torch.zeros(6, 99, dtype=dtype)
    wide[:, 60:94] = x
    sums = torch.ones(6, 50, dtype=dtype)
    got = rms_norm_linear(wide[:, 60:94], sums[:, :34], norm_weight, 1e-5, prepare_linear_weight(w), b, 40)
    total = torch.ones(6, 34, dtype=dtype)
    expected = reference.rms_norm_linear(x, total, norm_weight, 1e-5, w, b, 40)
    torch.testing.assert_close(got, expected)
    assert torch.equal(sums[:, :34], total)
    assert torch.equal(sums[:, 34:], torch.ones(6, 16, dtype=dtype))
    got = rms_norm_linear_silu_and_mul(x, None, norm_weight, 1e-5, prepare_silu_linear_weight(w), 20)
    torch.testing.assert_close(got, reference.rms_norm_linear_silu_and_mul(x, None, norm_weight, 1e-5, w, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_many_dimensional_input(dtype):
    x, w, b = make(6, 40, 34, dtype)
    prepared = prepare_linear_weight(w)
    expected = linear(x, prepared, b, 40)
    wide = torch.zeros(6, 99, dtype=dtype)
    wide[:, 60:94] = x
    assert torch.equal(linear(wide[:, 60:94], prepared, b, 40), expected)
    assert torch.equal(linear(x.t().contiguous().t(), prepared, b, 40), expected)
    assert torch.equal(linear(x.view(2, 3, 34), prepared, b, 40), expected.view(2, 3, 40))
    assert torch.equal(linear(x[0], prepared, b, 40), expected[0])
    permuted = x.view(2, 3, 34).transpose(0, 1)
    assert torch.equal(linear(permuted, prepared, b, 40), expected.view(2, 3, 40).transpose(0, 1))
    assert linear(x[:0], prepared, b, 40).shape == (0, 40)


def test_values_beyond_the_row_are_not_read_into_it():
    # Odd K: the pair that ends a row must not take its second half from the next.
    x = torch.full((4, 6), float("nan"), dtype=torch.bfloat16)
    x[:, :5] = 1
    prepared = prepare_linear_weight(torch.ones(16, 5, dtype=torch.bfloat16))
    assert torch.equal(linear(x[:, :5], prepared, None, 16), torch.full((4, 16), 5.0, dtype=torch.bfloat16))


def test_other_dtypes_use_the_reference():
    x, w, b = make(3, 8, 10, torch.float64)
    assert torch.equal(linear(x, prepare_linear_weight(w), b, 8), reference.linear(x, w, b, 8))
    gated = linear_silu_and_mul(x, prepare_silu_linear_weight(w), 4)
    assert torch.equal(gated, reference.linear_silu_and_mul(x, w, 4))
    assert torch.equal(linear_argmax(x, prepare_linear_weight(w), 8), reference.linear_argmax(x, w, 8))


def test_wrong_shapes_are_errors():
    x, w, b = make(3, 8, 10, torch.float32)
    prepared = prepare_linear_weight(w)
    for bad in (lambda: linear(x[:, :9], prepared, b, 8), lambda: linear(x, prepared, b, 17),
                lambda: linear(x.bfloat16(), prepared, None, 8), lambda: linear_argmax(x, prepared, 17)):  # fmt: skip
        with pytest.raises(RuntimeError, match="don't fit a weight packed as"):
            bad()


def test_works_under_torch_compile():
    x, w, b = make(5, 24, 16, torch.float32)
    prepared = prepare_linear_weight(w)
    compiled = torch.compile(lambda x: linear(x, prepared, b, 24) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear(x, prepared, b, 24) + 1)
