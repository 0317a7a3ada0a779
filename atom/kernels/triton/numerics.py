"""Products and rounding that mean the same on a GPU and in the interpreter.

The interpreter has no bfloat16 arithmetic (it multiplies the bits as integers) and rounds to
bfloat16 and float8 towards zero, so there operands are widened and values are rounded first.
"""

import triton
import triton.language as tl

from atom.kernels.triton.launch import CHIP

INTERPRET = tl.constexpr(CHIP == "interpret")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, float32 operands at full precision."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x to the nearest of dtype, ties to even; float8 values must be in its range."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        if dtype == tl.bfloat16:
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
        elif dtype == tl.float8e4nv or dtype == tl.float8e4b8:
            step = (bits & 0x7F800000).to(tl.float32, bitcast=True) * 0.125
            smallest: tl.constexpr = 2.0**-9 if dtype == tl.float8e4nv else 2.0**-10
            step = tl.maximum(step, smallest)
            # A large enough number leaves no room for anything below the step.
            x = (x + step * 12582912.0) - step * 12582912.0
    return x.to(dtype)
