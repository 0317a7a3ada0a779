"""The Triton kernels against the references: on a GPU if there is one, else in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from checks_triton import FN, FNUZ, QUANT_CHECKS, Case, case_id, full_cases, native_float8, small_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def supported(case: Case) -> bool:
    """A GPU has one of the two float8 encodings; the interpreter has both."""
    foreign = FN if native_float8() == FNUZ else FNUZ
    return DEVICE == "cpu" or foreign not in case[2]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy on NaN and inf, which are cases here
@pytest.mark.parametrize("case", [c for c in small_cases() if supported(c)], ids=case_id)
def test_kernel_equals_reference(case: Case) -> None:
    _, check, args, kwargs = case
    check(DEVICE, *args, **kwargs)


SLOW_IN_INTERPRETER = {"rms_norm", "add_rms_norm", "silu_and_mul", "fused_experts", "sample", *QUANT_CHECKS}
# The interpreter takes seconds a case: every third one there; tests/gpu has all.
GRID = [c for c in full_cases(native_float8()) if c[0] not in SLOW_IN_INTERPRETER][:: 3 if DEVICE == "cpu" else 1]


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=case_id)
def test_kernel_equals_reference_in_more_shapes(case: Case) -> None:
    _, check, args, kwargs = case
    check(DEVICE, *args, **kwargs)
