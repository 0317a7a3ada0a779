"""FlashInfer's attention over a paged cache [num_blocks, block_size, Hk, D], as wrappers: `plan` a step, `run` a layer.

Its kernels are compiled when first planned. Ye et al. 2025, https://arxiv.org/abs/2501.01005.
"""

from typing import Any

import torch

_workspaces: dict[torch.device, torch.Tensor] = {}


def workspace(device: torch.device, num_bytes: int) -> torch.Tensor:
    """uint8 [>= num_bytes], for partial results: all wrappers of a device share it, as their kernels run in order."""
    found = _workspaces.get(device)
    if found is None or found.numel() < num_bytes:
        # Graphs that were captured with a smaller one keep it.
        found = _workspaces[device] = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return found


def workspace_bytes(num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int, num_decodes: int) -> int:
    """What its planner may ask for: float32 results and their log-sum-exps, of each tile of each split.

    num_decodes: of the largest captured graph, which has room for a tile of each request.
    """
    group = num_heads // num_kv_heads
    splits = 2 * num_sms // num_kv_heads
    tile = 16 if group <= 16 else 64 if group <= 64 else 128
    decode = tile * max(splits, -(-num_decodes * group // tile) + num_decodes)
    prefill = 128 * splits
    return 4 * num_heads * (head_dim + 1) * max(decode, prefill) + (1 << 20)


def make_prefill(workspace: torch.Tensor) -> Any:
    """FlashAttention-3's kernels on Hopper, FlashAttention-2's elsewhere."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto")


def make_decode(workspace: torch.Tensor) -> Any:
    """Tensor cores, as they are no slower with one query head a key head, and the kernel is prefill's."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    return BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")


def make_graph_decode(workspace: torch.Tensor, integers: torch.Tensor, size: int, max_blocks: int) -> Any:
    """`make_decode` for CUDA graphs of `size` requests with `max_blocks` blocks in all.

    integers: uint8, where its plan goes on the device; graphs that never run at once share it.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    indptr, last_page_len, indices = (
        torch.zeros(n, dtype=torch.int32, device=workspace.device) for n in (size + 1, size, max_blocks)
    )
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last_page_len,
        backend="fa2",
    )
    wrapper.reset_workspace_buffer(workspace, integers)
    return wrapper
