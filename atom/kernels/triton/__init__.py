"""Triton kernels for NVIDIA and AMD GPUs; `TRITON_INTERPRET=1` runs them on a CPU."""

import importlib.util


def unavailable_reason() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"
