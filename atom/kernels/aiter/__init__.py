"""AITER (https://github.com/ROCm/aiter), AMD's kernels, where the package amd-aiter is installed."""

import torch

from atom.utils.packages import missing_reason

# From the first version whose prompt kernel takes blocks of 16 tokens in our layout. PyPI has only older ones, which
# is why there is no extra for it: pip could never install what it asks for.
AT_LEAST, BELOW = "0.1.12", "0.2"


def unavailable_reason() -> str | None:
    """Why AITER can't run here, or None."""
    if torch.version.hip is None:
        return "it runs on AMD GPUs, with a ROCm build of torch"
    remedy = f"build {AT_LEAST} or newer from github.com/ROCm/aiter"
    return missing_reason("aiter", "amd-aiter", AT_LEAST, BELOW, remedy)
