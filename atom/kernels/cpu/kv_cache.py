"""Writing keys and values into the paged cache, in C++."""

import torch
from torch.compiler import is_compiling

from atom.kernels.cpu.ops import fast, ops
from atom.kernels.torch import kv_cache as reference

_store_kv = fast.store_kv
_op_store_kv = ops.store_kv.default


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """As the reference; float8 is e4m3fn, with scales."""
    if is_compiling():
        _op_store_kv(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    elif _store_kv(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale) is NotImplemented:
        reference.store_kv(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
