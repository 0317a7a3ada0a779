"""Products and rounding that mean the same on a GPU and in the interpreter.

The interpreter has no bfloat16 arithmetic (it multiplies the bits as integers) and rounds to
bfloat16 and float8 towards zero, so there operands are widened and values are rounded first.
"""

import triton
import triton.language as tl

from atom.kernels.triton.launch import CHIP

INTERPRET = tl.constexpr(CHIP == "interpret")
_SMALLEST_AMAX = tl.constexpr(1e-10)  # a row of zeros has a scale, too
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: leaves no room for fractions in what is added to it


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, float32 operands at full precision."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x to the nearest of dtype, ties to even; float8 and int8 values must be in its range."""
    if dtype == tl.int8:
        x = (x + _ROUNDER) - _ROUNDER
    elif INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        if dtype == tl.bfloat16:
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
        elif dtype == tl.float8e4nv or dtype == tl.float8e4b8:
            step = (bits & 0x7F800000).to(tl.float32, bitcast=True) * 0.125
            smallest: tl.constexpr = 2.0**-9 if dtype == tl.float8e4nv else 2.0**-10
            step = tl.maximum(step, smallest)
            x = (x + step * _ROUNDER) - step * _ROUNDER
    return x.to(dtype)


@triton.jit
def scale_rows(x, TOP: tl.constexpr):
    """float32 [..., N] -> (x / scale, at most TOP; scale [..., 1]), as `atom.kernels.torch.quant.scale_rows`."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=len(x.shape) - 1, keep_dims=True), _SMALLEST_AMAX)
    scale = tl.div_rn(amax, tl.full(amax.shape, TOP, tl.float32))
    if INTERPRET:  # it rounds between the two operations of a fma
        values = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        # The rounded quotient, by one division a row and a correction (Markstein 1990): a division each is slow.
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        values = x * inverse
        missing = tl.fma(-values, tl.broadcast_to(scale, x.shape), x)
        values = tl.fma(missing, tl.broadcast_to(inverse, x.shape), values)
    return tl.minimum(tl.maximum(values, -TOP), TOP), scale
