"""AITER's attention over a paged cache [num_blocks, block_size, Hk, D]. Its kernels are compiled at their first use."""

import torch

_PARTITION = 256  # keys that one program of the decode kernel reads


def decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    max_seq_len: int,
    sliding_window: int,
    one: torch.Tensor,
) -> None:
    """One query token a request: query, output [R, Hq, D]; seq_lens int32 [R]; block_table int32 [R, max_blocks].

    one: float32 [1], 1.0, on the device: the scale of caches that have none.
    """
    from aiter.ops.attention import paged_attention_v1

    # Of each partition: its result in the query's type, its highest score and the sum of its exponentials in float32.
    partitions = query.shape[0] * query.shape[1] * -(-max_seq_len // _PARTITION)
    num_bytes = partitions * (query.shape[2] * query.element_size() + 8)
    paged_attention_v1(
        output,
        torch.empty(num_bytes, dtype=torch.uint8, device=query.device),
        query,
        k_cache,
        v_cache,
        scale,
        block_table,
        None,  # every request has one token
        seq_lens,
        max_seq_len,
        None,  # no ALiBi
        "auto",  # the cache's type is the query's
        "NHD",
        0.0,  # no cap on scores
        one,
        one,
        sliding_window=sliding_window,
    )


def prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int,
) -> None:
    """Query tokens query_start_loc[r] to [r + 1] of query and output [T, Hq, D], causally; others aren't touched."""
    from aiter.ops.mha import mha_batch_prefill_func

    mha_batch_prefill_func(
        query,
        k_cache,
        v_cache,
        query_start_loc,
        query_start_loc,  # not read, but it must look like offsets: the block table is in place of a flat list
        block_table,
        max_query_len,
        max_seq_len,
        softmax_scale=scale,
        causal=True,
        window_size=(sliding_window - 1, 0),  # it counts the tokens before; -1: no window
        out=output,
        block_table=block_table,
        seqlen_k=seq_lens,
    )
