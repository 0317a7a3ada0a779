"""AITER (https://github.com/ROCm/aiter), AMD's kernels, where the package amd-aiter is installed."""

import importlib

import torch

from atom.utils.packages import missing_reason

# From the first version whose prompt kernel takes blocks of 16 tokens in our layout. PyPI has only older ones, which
# is why there is no extra for it: pip could never install what it asks for.
AT_LEAST, BELOW = "0.1.12", "0.2"


def unavailable_reason() -> str | None:
    """Why AITER can't run here, or None."""
    if torch.version.hip is None:
        return "it runs on AMD GPUs, with a ROCm build of torch"
    reason = missing_reason("amd-aiter", AT_LEAST, BELOW, f"build {AT_LEAST} or newer from github.com/ROCm/aiter")
    if reason is not None:
        return reason
    try:
        importlib.import_module("aiter")
    except Exception as error:  # an incomplete installation raises what it likes
        return f"aiter can't be imported ({type(error).__name__}: {error})".splitlines()[0]
    return None
