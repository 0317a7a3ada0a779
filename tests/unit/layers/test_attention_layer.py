import pytest
import torch

from atom.forward_context import ForwardContext, set_forward_context
from atom.layers.attention.base import AttentionMetadata, KVCache
from atom.layers.attention.layer import Attention
from atom.layers.build import BuildContext

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 5


@pytest.fixture
def layer():
    context = BuildContext(dtype=torch.float32, kv_cache_dtype=torch.float32, block_size=16, max_model_len=64)
    return Attention(HEADS, KV_HEADS, DIM, layer_name="a", context=context)


@pytest.fixture
def qkv():
    return tuple(torch.randn(TOKENS, n * DIM) for n in (HEADS, KV_HEADS, KV_HEADS))


def metadata():
    return AttentionMetadata(
        query_start_loc=torch.tensor([0, TOKENS], dtype=torch.int32),
        seq_lens=torch.tensor([TOKENS], dtype=torch.int32),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        slot_mapping=torch.arange(16, 16 + TOKENS),
        num_decodes=0,
        max_query_len=TOKENS,
        max_seq_len=TOKENS,
    )


def causal(q, k, v):
    q, k, v = (x.view(TOKENS, -1, DIM).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
    return out[0].transpose(0, 1).reshape(TOKENS, -1)


def give_cache(layer):
    layer.kv_cache = KVCache(*(torch.full((2, 16, KV_HEADS, DIM), float("nan")) for _ in range(2)))


@pytest.mark.parametrize("split_into_heads", [False, True])
@pytest.mark.parametrize("through_the_op", [False, True])
def test_finds_its_cache_and_metadata(layer, qkv, split_into_heads, through_the_op):
    give_cache(layer)
    inputs = tuple(x.view(TOKENS, -1, DIM) for x in qkv) if split_into_heads or through_the_op else qkv
    with set_forward_context(ForwardContext(metadata(), {"a": layer})):
        if through_the_op:
            out = torch.empty(TOKENS, HEADS, DIM)
            torch.ops.aiter.unified_attention_with_output(*inputs, out, "a")
            out = out.flatten(1)
        else:
            out = layer(*inputs)
    torch.testing.assert_close(out, causal(*qkv))
    assert torch.equal(layer.kv_cache.k[1, :TOKENS].flatten(1), qkv[1])
    assert layer.kv_cache.k[0].isnan().all()  # another request's block


def test_a_profiling_run_gives_zeros_and_needs_no_cache(layer, qkv):
    with set_forward_context(ForwardContext(None, {"a": layer})):
        assert torch.equal(layer(*qkv), torch.zeros(TOKENS, HEADS * DIM))
