"""What `atom.kernels.torch.quant` promises: near values, no overflow, scales of their own, fused ops equal to steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.kernels import get_op
from atom.kernels.torch import activation, norm, quant
from atom.kernels.torch.quant_linear import dequantize

FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8
TYPES = (FN, FNUZ, INT8)


def widened(values: torch.Tensor, scales: torch.Tensor, group_size: int | None) -> torch.Tensor:
    size = values.shape[1]
    return values.double() * scales.double().repeat_interleave(group_size or size, 1)[:, :size]


def half_step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the distance between neighbours at each of the unrounded values, from the format's definition."""
    if dtype == INT8:
        return torch.full_like(values, 0.5)
    smallest = -6 if dtype == FN else -7  # exponent of the smallest normal number; three bits of mantissa
    exponents = torch.frexp(values.abs()).exponent - 1
    return 2.0 ** (exponents.clamp(min=smallest) - 3).double() / 2


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 300),
    st.sampled_from(TYPES),
    st.sampled_from([None, 32, 128]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(-30, 30),
    st.integers(0, 2**31),
)
def test_dequantized_rows_are_within_half_a_step(tokens, size, to, group_size, dtype, exponent, seed):
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if dtype != torch.float16:
        x = x * 2.0**exponent
    values, scales = quant.quantize(x, to, group_size)
    groups = 1 if group_size is None else -(-size // group_size)
    assert (values.shape, values.dtype, values.is_contiguous()) == (x.shape, to, True)
    assert (scales.shape, scales.dtype) == ((tokens, groups), torch.float32)
    assert not values.float().isnan().any()
    scale = scales.double().repeat_interleave(group_size or size, 1)[:, :size]
    error = (widened(values, scales, group_size) - x.double()).abs()
    rounding = x.double().abs() * 1e-6  # of the division and of the scale itself
    assert (error <= half_step(x.double() / scale, to) * scale + rounding).all()


@pytest.mark.parametrize("to", TYPES)
def test_the_largest_value_is_used_and_not_passed(to):
    top = quant.largest(to)
    x = torch.tensor([[-3.0, 1.0, 3.0], [1e30, -1e30, 3e38], [0.1, -0.7, 0.3]])
    values, scales = quant.quantize(x, to)
    assert values.float().abs().amax(1).tolist() == [top] * 3
    torch.testing.assert_close(scales[:, 0] * top, x.abs().amax(1))


@pytest.mark.parametrize("to", TYPES)
def test_rows_of_zeros_and_tiny_numbers(to):
    x = torch.zeros(3, 200)
    x[1, 150] = 1e-20
    x[2, 150] = 1e-10
    for group_size in (None, 128):
        values, scales = quant.quantize(x, to, group_size)
        assert torch.equal(values[:2].float(), torch.zeros(2, 200))
        assert values[2].float().abs().max() == quant.largest(to)
        assert (scales > 0).all()
        assert scales.isfinite().all()


def test_ties_go_to_the_even_neighbour():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]])
    assert quant.quantize(x, INT8)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 64]]
    x = torch.tensor([[448.0, 17.0, 19.0, 21.0, -17.0, 2.0**-10, 3 * 2.0**-10]])  # steps of 2, then of 2**-9
    assert quant.quantize(x, FN)[0].float().tolist() == [[448, 16, 20, 20, -16, 0, 2.0**-8]]


@pytest.mark.parametrize("to", TYPES)
def test_a_group_knows_nothing_of_the_others(to):
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    x[:, 127] = 1000.0  # the last of the first group
    x[:, 256] = 1e-3  # the first of the last, of 44 columns
    values, scales = quant.quantize(x, to, 128)
    for group, columns in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        alone, scale = quant.quantize(x[:, columns], to)
        assert torch.equal(values[:, columns].float(), alone.float())
        assert torch.equal(scales[:, group], scale[:, 0])
    assert (scales[:, 0] > 100 * scales[:, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 160, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_computes_the_same(size, dtype):
    def both(x):
        values, scales = quant.quantize(x, FN, 128)
        return values, scales, dequantize(values, scales, 128)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True)
    for tokens in (9, 24, 2):
        x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        torch._dynamo.mark_dynamic(x, 0)
        for got, expected in zip(compiled(x), both(x), strict=True):
            assert torch.equal(got.float(), expected.float())


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("to", TYPES)
def test_fused_ops_equal_their_steps(to, group_size):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, 320, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(320, generator=generator).bfloat16()
    total = x + residual
    steps = {
        "rms_norm_quant": ((x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5)),
        "add_rms_norm_quant": ((x, residual, weight, 1e-5), norm.rms_norm(total, weight, 1e-5)),
        "silu_and_mul_quant": ((x,), activation.silu_and_mul(x)),
    }
    for name, (args, plain) in steps.items():
        expected, scales = quant.quantize(plain, to, group_size)
        got, got_scales, *rest = get_op(name, ("torch",))(*args, to, group_size)
        assert torch.equal(got.float(), expected.float())
        assert torch.equal(got_scales, scales)
        assert all(torch.equal(r, total) for r in rest)
        assert len(rest) == (name == "add_rms_norm_quant")
