"""Every rank's part of a tensor, put together again, is the tensor; and parts together compute what the whole does."""

import pytest
import torch
import torch.nn.functional as F

from atom.distributed.parallel_state import TPGroup
from atom.kernels.torch.activation import silu_and_mul
from atom.layers.build import BuildContext
from atom.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from atom.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from atom.layers.mlp import GatedMLP
from atom.layers.moe.fused_moe import FusedMoE
from atom.utils.errors import ModelLoadError

HIDDEN = 24


def context(rank=0, size=1):
    return BuildContext(
        dtype=torch.float32,
        kv_cache_dtype=torch.float32,
        block_size=16,
        max_model_len=64,
        tp=TPGroup(rank, size),
    )


def ranks(build, size):
    """The layer as each rank builds it, with memory that shows what loading leaves out."""
    layers = [build(context(rank, size)) for rank in range(size)]
    for layer in layers:
        for param in layer.parameters():
            param.data.fill_(float("nan"))
    return layers


def load(param, *args):
    """A load as the model loader does it: (loaded, shard_id, expert_id)."""
    loaded, shard_id, expert_id = (*args, None, None)[:3]
    param.weight_loader(param, loaded, shard_id, expert_id)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_column_parallel(size):
    layers = ranks(lambda c: ColumnParallelLinear(HIDDEN, 8, bias=True, context=c), size)
    weight, bias = torch.randn(8, HIDDEN), torch.randn(8)
    for layer in layers:
        load(layer.weight, weight)
        load(layer.bias, bias)
        assert layer.weight.num_shards == layer.bias.num_shards == 1
    assert torch.equal(torch.cat([layer.weight for layer in layers]), weight)
    assert torch.equal(torch.cat([layer.bias for layer in layers]), bias)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_merged_column_parallel(size, whole):
    layers = ranks(lambda c: MergedColumnParallelLinear(HIDDEN, [8, 16], bias=True, context=c), size)
    gate, up = torch.randn(8, HIDDEN), torch.randn(16, HIDDEN)
    biases = torch.randn(8), torch.randn(16)
    for layer in layers:
        assert layer.weight.num_shards == layer.bias.num_shards == 2
        if whole:
            load(layer.weight, torch.cat([gate, up]))
            load(layer.bias, torch.cat(biases))
        else:
            for shard_id in (1, 0):
                load(layer.weight, (gate, up)[shard_id], shard_id)
                load(layer.bias, biases[shard_id], shard_id)
    for name, expected in (("weight", (gate, up)), ("bias", biases)):
        parts = [getattr(layer, name).split([8 // size, 16 // size]) for layer in layers]
        for shard_id in (0, 1):
            assert torch.equal(torch.cat([part[shard_id] for part in parts]), expected[shard_id])


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 1), (4, 2, 2), (8, 2, 4), (8, 1, 8), (6, 6, 3)])
@pytest.mark.parametrize("whole", [False, True])
def test_qkv_parallel_keeps_each_kv_head_with_its_query_heads(heads, kv_heads, size, whole):
    dim = 4
    layers = ranks(lambda c: QKVParallelLinear(HIDDEN, dim, heads, kv_heads, bias=True, context=c), size)
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    weights, biases = [torch.randn(n, HIDDEN) for n in sizes], [torch.randn(n) for n in sizes]
    for rank, layer in enumerate(layers):
        assert layer.weight.num_shards == layer.bias.num_shards == 3
        if whole:
            load(layer.weight, torch.cat(weights))
            load(layer.bias, torch.cat(biases))
        else:
            for shard_id in range(3):
                load(layer.weight, weights[shard_id], shard_id)
                load(layer.bias, biases[shard_id], shard_id)
        my_heads = range(rank * heads // size, (rank + 1) * heads // size)
        my_kv_heads = sorted({head * kv_heads // heads for head in my_heads})
        assert (layer.num_heads, layer.num_kv_heads) == (len(my_heads), len(my_kv_heads))
        for got, whole_tensors in ((layer.weight, weights), (layer.bias, biases)):
            pieces = [
                whole_tensor.unflatten(0, (-1, dim))[list(chosen)].flatten(0, 1)
                for whole_tensor, chosen in zip(whole_tensors, (my_heads, my_kv_heads, my_kv_heads), strict=True)
            ]
            assert torch.equal(got, torch.cat(pieces))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_parts_add_up_to_the_whole(size):
    layers = ranks(lambda c: RowParallelLinear(HIDDEN, 8, bias=True, context=c), size)
    weight, bias, x = torch.randn(8, HIDDEN), torch.randn(8), torch.randn(5, HIDDEN)
    total = torch.zeros(5, 8)
    for rank, layer in enumerate(layers):
        load(layer.weight, weight)
        load(layer.bias, bias)
        layer.process_weights_after_loading()
        layer.tp = TPGroup()  # this rank's part, before the sum over ranks
        total += layer(x.chunk(size, dim=1)[rank].contiguous())
    torch.testing.assert_close(total, F.linear(x, weight, bias))


def test_replicated_is_whole_on_every_rank():
    weight = torch.randn(8, HIDDEN)
    for layer in ranks(lambda c: ReplicatedLinear(HIDDEN, 8, context=c), 2):
        load(layer.weight, weight)
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(("vocab", "size"), [(10, 1), (10, 2), (10, 4), (9, 8)])
def test_embedding_parts_add_up_and_padding_is_zero(vocab, size):
    layers = ranks(lambda c: VocabParallelEmbedding(vocab, HIDDEN, context=c), size)
    weight = torch.randn(vocab, HIDDEN)
    for layer in layers:
        load(layer.weight, weight)
    together = torch.cat([layer.weight for layer in layers])
    assert torch.equal(together[:vocab], weight)
    assert not together[vocab:].any()
    assert len(together) % size == 0


def test_lm_head_gives_float32_logits_of_the_vocabulary_and_leaves_a_tied_embedding_as_it_is():
    embedding = VocabParallelEmbedding(11, HIDDEN, context=context())
    head = ParallelLMHead(11, HIDDEN, context=context())
    head.tie(embedding)
    weight, hidden = torch.randn(11, HIDDEN), torch.randn(3, HIDDEN)
    load(embedding.weight, weight)
    assert head.weight is embedding.weight
    for layer in (embedding, head):
        layer.process_weights_after_loading()
    assert torch.equal(embedding(torch.tensor([10, 0])), weight[[10, 0]])
    logits = head(hidden)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, hidden @ weight.t())


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(bias):
    mlp = GatedMLP(HIDDEN, 20, "silu", bias=bias, context=context(), prefix="mlp")
    tensors = {name: torch.randn(20, HIDDEN) for name in ("gate", "up")} | {"down": torch.randn(HIDDEN, 20)}
    biases = {name: torch.randn(len(t)) for name, t in tensors.items()}
    for layer, parts in ((mlp.gate_up_proj, ("gate", "up")), (mlp.down_proj, ("down",))):
        for shard_id, part in enumerate(parts):
            number = shard_id if len(parts) > 1 else None
            load(layer.weight, tensors[part], number)
            if bias:
                load(layer.bias, biases[part], number)
        layer.process_weights_after_loading()
    x = torch.randn(4, HIDDEN)
    gate, up, down = (lambda y, n=n: F.linear(y, tensors[n], biases[n] if bias else None) for n in tensors)
    torch.testing.assert_close(mlp(x), down(F.silu(gate(x)) * up(x)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelLoadError, match="hidden_act='gelu'"):
        GatedMLP(HIDDEN, 20, "gelu", context=context(), prefix="mlp")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_parts_add_up_to_the_mixture(size, renormalize):
    num, width, top_k = 4, 6, 2
    gate, up = torch.randn(num, width, HIDDEN), torch.randn(num, width, HIDDEN)
    down = torch.randn(num, HIDDEN, width)
    x, router_logits = torch.randn(5, HIDDEN), torch.randn(5, num)
    build = lambda c: FusedMoE(num, top_k, HIDDEN, width, renormalize=renormalize, context=c)  # noqa: E731
    total = torch.zeros(5, HIDDEN)
    for layer in ranks(build, size):
        assert (layer.w13_weight.num_shards, layer.w2_weight.num_shards) == (2 * num, num)
        for expert in range(num):
            load(layer.w13_weight, gate[expert], 0, expert)
            load(layer.w13_weight, up[expert], 1, expert)
            load(layer.w2_weight, down[expert], 0, expert)
        layer.tp = TPGroup()
        total += layer(x, router_logits)

    expected = torch.zeros(5, HIDDEN)
    for token in range(5):
        chances = torch.softmax(router_logits[token], dim=0)
        chosen = chances.topk(top_k).indices.tolist()
        share = chances[chosen].sum() if renormalize else 1.0
        for expert in chosen:
            hidden = silu_and_mul(torch.cat([gate[expert], up[expert]]) @ x[token])
            expected[token] += chances[expert] / share * (down[expert] @ hidden)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "parameter", "shard", "expected", "found"),
    [
        (lambda c: ColumnParallelLinear(HIDDEN, 8, context=c), "weight", (), [8, 24], [4, 24]),
        (lambda c: MergedColumnParallelLinear(HIDDEN, [8, 8], context=c), "weight", (1,), [8, 24], [8, 23]),
        (lambda c: MergedColumnParallelLinear(HIDDEN, [8, 8], context=c), "weight", (), [16, 24], [8, 24]),
        (lambda c: QKVParallelLinear(HIDDEN, 4, 4, 2, context=c), "weight", (1,), [8, 24], [16, 24]),
        (lambda c: RowParallelLinear(HIDDEN, 8, bias=True, context=c), "weight", (), [8, 24], [8, 12]),
        (lambda c: RowParallelLinear(HIDDEN, 8, bias=True, context=c), "bias", (), [8], [16]),
        (lambda c: ReplicatedLinear(HIDDEN, 8, context=c), "weight", (), [8, 24], [1, 24]),
        (lambda c: VocabParallelEmbedding(10, HIDDEN, context=c), "weight", (), [10, 24], [12, 24]),
        (lambda c: ParallelLMHead(10, HIDDEN, context=c), "weight", (), [10, 24], [10, 1]),
        (
            lambda c: FusedMoE(2, 1, HIDDEN, 6, renormalize=True, context=c),
            "w2_weight",
            (0, 1),
            [24, 6],
            [6, 24],
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_wrong_shape_is_named_with_the_right_one(build, parameter, shard, expected, found, size):
    """The shapes are those of the checkpoint, whatever the number of ranks."""
    for layer in ranks(build, size):
        with pytest.raises(ModelLoadError) as caught:
            load(getattr(layer, parameter), torch.zeros(found), *shard)
        assert str(caught.value) == f"expected shape {expected}, found {found}"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda c: QKVParallelLinear(HIDDEN, 4, 4, 4, context=c), "tensor_parallel_size=3 .*num_attention_heads=4"),
        (lambda c: QKVParallelLinear(HIDDEN, 4, 6, 2, context=c), "tensor_parallel_size=3 .*num_key_value_heads=2"),
        (lambda c: QKVParallelLinear(HIDDEN, 4, 6, 4, context=c), "num_key_value_heads=4 .*num_attention_heads=6"),
        (lambda c: ColumnParallelLinear(HIDDEN, 8, context=c, prefix="q"), "tensor_parallel_size=3 .*q.out_features=8"),
        (lambda c: RowParallelLinear(8, HIDDEN, context=c, prefix="o"), "tensor_parallel_size=3 .*o.in_features=8"),
    ],
)
def test_sizes_that_do_not_divide(build, message):
    with pytest.raises(ModelLoadError, match=message):
        build(context(0, 3))
