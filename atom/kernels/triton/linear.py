"""Dense layers: torch's own matrix product, with our activation behind it."""

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from atom.kernels.torch import linear as reference
from atom.kernels.triton.activation import silu_and_mul

prepare_silu_linear_weight = reference.prepare_silu_linear_weight


def linear_silu_and_mul(x: torch.Tensor, prepared: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """`atom.kernels.torch.linear.linear_silu_and_mul`."""
    if is_compiling():  # the compiler fuses plain torch
        return reference.linear_silu_and_mul(x, prepared, intermediate_size)
    return silu_and_mul(F.linear(x, prepared))
