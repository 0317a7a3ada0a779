"""FlashInfer (https://github.com/flashinfer-ai/flashinfer), where the extra `flashinfer` is installed."""

import torch

from atom.utils.packages import missing_reason

# As in pyproject.toml's extra: from the first version whose wrappers we have read to the last such series.
AT_LEAST, BELOW = "0.6.8", "0.8"


def unavailable_reason() -> str | None:
    """Why FlashInfer can't run here, or None; importing it takes a few seconds."""
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, not on AMD ones"
    remedy = 'pip install "atom-inference[flashinfer]"'
    return missing_reason("flashinfer", "flashinfer-python", AT_LEAST, BELOW, remedy)
