"""One kernel's beginning during another's end; see `launch.overlap_options`."""

import triton
import triton.language as tl


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The stream's next kernel may be launched as soon as every program of this one has begun."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Until all earlier kernels of the stream have ended and their results can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
