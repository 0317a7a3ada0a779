"""Attention over the paged cache in C++, one kernel for decodes and prompt chunks."""

import torch
from torch.compiler import is_compiling

from atom.kernels.cpu.ops import fast, ops
from atom.kernels.torch import attention as reference

_paged_attention = fast.paged_attention
_op_paged_attention = ops.paged_attention.default


def paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """As the reference. A query's bits depend on its own position and context only."""
    step = (query_start_loc, seq_lens, block_table, output, scale)
    if is_compiling():
        _op_paged_attention(query, k_cache, v_cache, *step, sliding_window, k_scale, v_scale)
    elif _paged_attention(query, k_cache, v_cache, *step, sliding_window, k_scale, v_scale) is NotImplemented:
        counts = (num_decodes, max_query_len, max_seq_len, sliding_window)
        reference.paged_attention(query, k_cache, v_cache, *step, *counts, k_scale, v_scale)
