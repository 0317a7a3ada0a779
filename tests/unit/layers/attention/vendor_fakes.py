"""Stand-ins for vendors' packages that can't run here: their documented calls, checks and meaning, in plain torch."""

import math
import sys
from types import ModuleType

import torch


def attend(query, keys, values, scale, causal, window):
    """One request: [n, Hq, D] queries, the last of [m, Hk, D] keys; window counts the tokens seen, 0 = all."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    position = torch.arange(len(keys) - len(query), len(keys))[:, None]
    key_position = torch.arange(len(keys))
    hidden = torch.zeros(len(query), len(keys), dtype=torch.bool)
    if causal:
        hidden |= key_position > position
    if window:
        hidden |= key_position <= position - window
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, values).to(query.dtype)


class PagedWrapper:
    """What FlashInfer's wrappers for paged caches have in common; plan copies, run reads nothing but copies."""

    made: list["PagedWrapper"] = []

    def __init__(self, workspace, kv_layout, graph_size=None, buffers=()):
        assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")
        self.graph_size, self.buffers = graph_size, list(buffers)
        self.num_plans = 0
        PagedWrapper.made.append(self)

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def _plan(self, starts, indptr, indices, last_page_len, page_size, causal, sm_scale, window_left):
        assert {x.dtype for x in (starts, indptr, indices, last_page_len)} == {torch.int32}
        assert {x.device.type for x in (starts, indptr, last_page_len)} == {"cpu"}, "it would wait for the device"
        assert len(starts) == len(indptr) == len(last_page_len) + 1
        assert int(starts[0]) == int(indptr[0]) == 0
        assert len(indices) == int(indptr[-1])
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())
        assert bool((indptr.diff() >= 1).all())
        arrays = (indptr, indices, last_page_len)
        if self.graph_size is None:
            self.buffers = [x.clone() for x in arrays]
        else:
            assert len(last_page_len) == self.graph_size, "a graph's batch has one size"
            for buffer, array in zip(self.buffers, arrays, strict=True):
                buffer[: len(array)] = array
        self.starts = starts.clone()
        self.page_size, self.causal, self.scale, self.window_left = page_size, causal, sm_scale, window_left
        self.num_plans += 1

    def run(self, q, paged_kv_cache, *, out):
        assert self.num_plans, "planned before it runs"
        assert q.shape[0] == int(self.starts[-1])
        assert q.shape == out.shape
        indptr, indices, last_page_len = self.buffers
        for r in range(len(last_page_len)):
            blocks = indices[indptr[r] : indptr[r + 1]].long()
            length = (len(blocks) - 1) * self.page_size + int(last_page_len[r])
            k, v = (cache[blocks].flatten(0, 1)[:length] for cache in paged_kv_cache)
            rows = slice(int(self.starts[r]), int(self.starts[r + 1]))
            out[rows] = attend(q[rows], k, v, self.scale, self.causal, self.window_left + 1)
        return out


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
    ):
        assert backend in ("auto", "fa2")
        size = None
        if use_cuda_graph:
            size = len(paged_kv_last_page_len_buffer)
            assert len(paged_kv_indptr_buffer) == size + 1
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        super().__init__(float_workspace_buffer, kv_layout, size, buffers)

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        sm_scale=None,
        window_left=-1,
        q_data_type="float16",
        kv_data_type=None,
    ):
        starts = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(starts, indptr, indices, last_page_len, page_size, False, sm_scale, window_left)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", backend="auto"):
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal=False,
        sm_scale=None,
        window_left=-1,
        q_data_type="float16",
        kv_data_type=None,
    ):
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._plan(*arrays, page_size, causal, sm_scale, window_left)


def paged_attention_v1(
    out,
    workspace_buffer,
    query,
    key_cache,
    value_cache,
    scale,
    block_tables,
    cu_query_lens,
    context_lens,
    max_context_len,
    alibi_slopes,
    kv_cache_dtype,
    kv_cache_layout,
    logits_soft_cap,
    k_scale,
    v_scale,
    fp8_out_scale=None,
    partition_size=256,
    mtp=1,
    sliding_window=0,
):
    """AITER's decode; what it does not read, it does not check."""
    num_seqs, num_heads, head_size = query.shape
    partitions = num_seqs * num_heads * math.ceil(max_context_len / partition_size)
    needed = partitions * (head_size * query.element_size() + 2 * 4)
    assert workspace_buffer.numel() * workspace_buffer.element_size() >= needed
    assert block_tables.shape[0] == context_lens.shape[0] == num_seqs
    assert block_tables.shape[1] >= math.ceil(max_context_len / key_cache.shape[1])
    assert block_tables.is_contiguous()
    assert out.is_contiguous()
    assert int(context_lens.max()) <= max_context_len
    assert (cu_query_lens, alibi_slopes, kv_cache_dtype, kv_cache_layout) == (None, None, "auto", "NHD")
    assert logits_soft_cap == 0
    assert k_scale.dtype == v_scale.dtype == torch.float32
    for r, length in enumerate(context_lens.tolist()):
        if length:
            k, v = (cache[block_tables[r].long()].flatten(0, 1)[:length] for cache in (key_cache, value_cache))
            out[r] = attend(query[r : r + 1], k, v, scale, False, sliding_window)[0]


def mha_batch_prefill_func(
    q,
    k,
    v,
    cu_seqlens_q,
    kv_indptr,
    kv_page_indices,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    logits_soft_cap=0.0,
    causal=False,
    window_size=(-1, -1),
    out=None,
    block_table=None,
    seqlen_k=None,
):
    """AITER's prompts, with a block table in place of kv_indptr and kv_page_indices."""
    assert {x.dtype for x in (cu_seqlens_q, kv_indptr, kv_page_indices, block_table, seqlen_k)} == {torch.int32}
    assert k.shape[1] in (1, 16, 1024)
    assert len(kv_indptr) == len(cu_seqlens_q) == len(seqlen_k) + 1 == len(block_table) + 1
    assert out.shape == q.shape
    for r, (start, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        length = int(seqlen_k[r])
        assert end - start <= max_seqlen_q
        assert length <= max_seqlen_k
        keys, values = (cache[block_table[r].long()].flatten(0, 1)[:length] for cache in (k, v))
        out[start:end] = attend(q[start:end], keys, values, softmax_scale, causal, window_size[0] + 1)


def install_flashinfer(monkeypatch):
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(PagedWrapper, "made", [])


def install_aiter(monkeypatch):
    functions = {"attention": paged_attention_v1, "mha": mha_batch_prefill_func}
    names = ["aiter", "aiter.ops", *(f"aiter.ops.{name}" for name in functions)]
    modules = {name: ModuleType(name) for name in names}
    for name, function in functions.items():
        setattr(modules[f"aiter.ops.{name}"], function.__name__, function)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
