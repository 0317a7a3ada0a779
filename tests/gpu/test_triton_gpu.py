"""The Triton kernels over the full grid of shapes, on a GPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from checks_triton import Case, case_id, full_cases, native_float8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]


@pytest.mark.parametrize("case", full_cases(native_float8()), ids=case_id)
def test_kernel_equals_reference_on_gpu(case: Case) -> None:
    _, check, args, kwargs = case
    check("cuda", *args, **kwargs)
