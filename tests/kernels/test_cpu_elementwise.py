"""The C++ norms, activations, rotary embedding and argmax against the references in float64."""

import pytest
import torch

from atom.kernels import cpu
from atom.kernels.torch import activation, norm, rotary

reason = cpu.unavailable_reason()
if reason:
    pytest.skip(reason, allow_module_level=True)

from atom.kernels.cpu.activation import silu_and_mul  # noqa: E402
from atom.kernels.cpu.embedding import embedding  # noqa: E402
from atom.kernels.cpu.norm import add_rms_norm, rms_norm  # noqa: E402
from atom.kernels.cpu.rotary import rotary_embedding_  # noqa: E402
from atom.kernels.cpu.sampling import greedy as argmax  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got, exact, dtype, units=1.0):
    assert got.dtype == dtype
    error = (got.double() - exact).abs() - exact.abs() * UNIT[dtype] * units
    assert error.max() < 4e-7, error.max()  # terms that cancel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (3, 17), (200, 64), (33, 2048), (2, 5, 16), (7,)])
def test_norms(shape, dtype):
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[-1], dtype=dtype)
    # The reference rounds before it scales: two roundings.
    assert_near(rms_norm(x, weight, 1e-5), norm.rms_norm(x.double(), weight.double(), 1e-5), dtype, 2.1)
    total = x + residual
    exact = norm.rms_norm(total.double(), weight.double(), 1e-5)
    got, summed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, total)
    assert_near(got, exact, dtype, 2.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_strided_rows(dtype):
    fused, weight = randn(9, 12, 64, dtype=dtype), randn(64, dtype=dtype)
    heads = fused[:, 3:7]
    assert torch.equal(rms_norm(heads, weight, 1e-6), rms_norm(heads.contiguous(), weight, 1e-6))
    flat = fused.view(9, -1)[:, 64:128]
    assert torch.equal(rms_norm(flat, weight, 1e-6), rms_norm(flat.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_functional_norm_changes_no_input(dtype):
    x, residual, weight = randn(40, 96, dtype=dtype), randn(40, 96, dtype=dtype, seed=1), randn(96, dtype=dtype)
    before = x.clone(), residual.clone()
    got = torch.ops.atom_cpu.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    for part, expected in zip(got, add_rms_norm(x, residual, weight, 1e-5), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_embedding(tokens, dtype):
    table = randn(50, 3, 24, dtype=dtype)[:, 1]  # its rows are apart
    ids = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(embedding(ids, table), table[ids])
    for wrong in (-1, 50):
        with pytest.raises((IndexError, RuntimeError), match=r"50 rows|out of range"):
            embedding(torch.tensor([3, wrong]), table)


def test_norm_of_other_dtypes_uses_the_reference():
    x, weight = randn(3, 8, dtype=torch.float64), randn(8, dtype=torch.float64)
    assert torch.equal(rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6))
    assert torch.equal(add_rms_norm(x, x.clone(), weight, 1e-6)[0], norm.rms_norm(x + x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 34), (40, 1024), (2, 3, 32)])
def test_silu_and_mul(shape, dtype):
    x = randn(*shape, dtype=dtype) * 4
    assert_near(silu_and_mul(x), activation.silu_and_mul(x.double()), dtype)


def test_silu_of_extremes():
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("inf"), float("nan")])
    got = silu_and_mul(torch.cat([gate, torch.ones(8)]).unsqueeze(0))[0]
    assert torch.equal(got[3:7], gate[3:7])
    assert (got[:3].abs() < 1e-30 * gate[:3].abs().clamp(min=1)).all()
    assert got[7].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 32), (96, 96), (18, 10)])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_rotary(tokens, dim, rotary_dim, interleaved, dtype):
    fused = randn(tokens, 8, dim, dtype=dtype)
    angle = torch.rand(1000, rotary_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    positions = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(3))
    exact = fused.double()
    rotary.rotary_embedding_(positions, exact[:, :5], exact[:, 5:7], cos_sin.double(), interleaved)
    got = fused.clone()
    rotary_embedding_(positions, got[:, :5], got[:, 5:7], cos_sin, interleaved)
    assert torch.equal(got[:, 7], fused[:, 7])
    assert_near(got, exact, dtype, 1.01)


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 4096, 4097, 49152])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_argmax(rows, vocabulary):
    x = randn(rows, vocabulary, dtype=torch.float32).round()  # many ties
    assert torch.equal(argmax(x), x.argmax(-1))
    x[0, vocabulary // 2] = float("nan")
    x[-1, -1] = float("inf")
    assert torch.equal(argmax(x), x.argmax(-1))
    assert torch.equal(argmax(torch.full((rows, vocabulary), float("-inf"))), torch.zeros(rows, dtype=torch.int64))
