"""Long prompts that begin in a step may skip the cache: the result is the same."""

import pytest
import torch

pytest.importorskip("triton")

from atom.layers.attention.backends import triton
from atom.layers.attention.backends.torch import TorchAttentionBackend
from atom.layers.attention.base import AttentionMetadata, AttentionSpec, KVCache, PackedRotation

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 32, 16
# a decode, a chunk that sees 20 earlier tokens, a short prompt and two long ones; the last's tokens are padding
COUNTS, SEQ_LENS, PADDING = [1, 6, 3, 8, 17], [9, 26, 3, 8, 17], 2
STARTS = [0, 1, 7, 10, 18, 35]


def make_step():
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(20, generator=generator)[:10].view(5, 2).int()
    slots = [
        int(table[r, p // BLOCK]) * BLOCK + p % BLOCK
        for r, (count, length) in enumerate(zip(COUNTS, SEQ_LENS, strict=True))
        for p in range(length - count, length)
    ]
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor(STARTS, dtype=torch.int32),
        seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots + [-1] * PADDING),
        num_decodes=1,
        max_query_len=17,
        max_seq_len=26,
        fresh_prompts=((7, 3), (10, 8), (18, 17)),
    )
    qkv = torch.randn(STARTS[-1] + PADDING, HEADS + 2 * KV_HEADS, DIM, generator=generator)
    caches = [torch.randn(20, BLOCK, KV_HEADS, DIM, generator=generator) for _ in "kv"]
    return metadata, qkv, caches


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_through_torchs_attention_equal_the_reference(packed, monkeypatch):
    monkeypatch.setattr(triton, "_LONG_PROMPT", 5)
    spec = AttentionSpec(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        scale=0.3,
        dtype=torch.float32,
        block_size=BLOCK,
        kv_cache_dtype=torch.float32,
    )
    metadata, qkv, caches = make_step()
    outputs = []
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(triton.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    for backend in (TorchAttentionBackend(spec), triton.TritonAttentionBackend(spec)):
        backend.uses_torch_for_prompts = True
        calls.clear()
        cache = KVCache(*(c.clone() for c in caches))
        output = torch.zeros(len(qkv), HEADS, DIM)
        if packed:
            angle = torch.arange(40)[:, None] * 0.7 ** torch.arange(DIM // 2)
            rotation = PackedRotation(
                cos_sin_cache=torch.cat([angle.cos(), angle.sin()], 1),
                interleaved=False,
                q_weight=None,
                k_weight=None,
                eps=0.0,
            )
            positions = torch.arange(len(qkv)) % 30
            backend.forward_packed(qkv, positions, rotation, cache, metadata, output)
        else:
            backend.forward(*qkv.split([HEADS, KV_HEADS, KV_HEADS], 1), cache, metadata, output)
        outputs.append(output[: STARTS[-1]])
    assert len(calls) == 2
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
