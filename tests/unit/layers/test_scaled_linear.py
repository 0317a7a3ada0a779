"""Float8 linear layers: scales as checkpoints share them, cut among ranks, multiplied as the reference says."""

import pytest
import torch
import torch.nn.functional as F

from atom.config import QuantizationConfig
from atom.distributed.parallel_state import TPGroup
from atom.kernels import get_op, unavailable_reason
from atom.kernels.torch import quant
from atom.kernels.torch.quant_linear import dequantize
from atom.layers.build import BuildContext
from atom.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from atom.layers.moe.fused_moe import FusedMoE
from atom.layers.norm import RMSNorm
from atom.layers.quant.base import QuantizedRows
from atom.layers.quant.registry import METHODS, get_linear_method
from atom.layers.quant.scaled import scales_by_row, to_fnuz
from atom.quant_spec import SERVED, LayerQuantConfig, QuantType, parse_quant_config
from atom.utils.errors import ModelLoadError

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
TENSOR = {"quant_method": "fp8"}


def context(config, rank=0, size=1, **more):
    quant_config = QuantizationConfig()
    quant_config.hf_quant_config = config
    quant_config._parsed = parse_quant_config(config)
    quant_config.global_quant_config = quant_config._parsed.global_spec
    return BuildContext(
        dtype=torch.float32,
        kv_cache_dtype=torch.float32,
        block_size=16,
        max_model_len=64,
        quant_config=quant_config,
        tp=TPGroup(rank, size),
        **more,
    )


def stored(rows, columns, blocks):
    """(float8 weight, its scales, what they mean)"""
    values = torch.randn(rows, columns).to(FN)
    if not blocks:
        scale = torch.rand(1) + 0.5
        return values, scale, values.float() * scale
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    wide = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return values, scales, values.float() * wide


def load(layer, values, scales, shard_id=None):
    for param, loaded in ((layer.weight, values), (layer.weight_scale, scales)):
        param.weight_loader(param, loaded, shard_id, None)


def meaning(layer):
    return dequantize(layer.weight.data, layer.weight_scale.data, layer.method.row_format.group_size)


def test_every_served_format_has_a_method():
    assert set(METHODS) == set(SERVED)
    with pytest.raises(ModelLoadError, match="int8 weights per_Token are not supported yet"):
        get_linear_method(LayerQuantConfig(QuantType.per_Token, torch.int8), context(TENSOR))


def test_scales_of_a_tensor_of_rows_and_of_blocks():
    assert scales_by_row(torch.tensor(2.0), 3).tolist() == [[2.0]] * 3
    assert scales_by_row(torch.tensor([2.0]), 3).tolist() == [[2.0]] * 3
    assert scales_by_row(torch.tensor([1.0, 2.0]), 2).tolist() == [[1.0], [2.0]]
    assert scales_by_row(torch.tensor([[1.0], [2.0]]), 2).tolist() == [[1.0], [2.0]]
    blocks = scales_by_row(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 130)
    assert blocks[[0, 127, 128, 129]].tolist() == [[1.0, 2.0]] * 2 + [[3.0, 4.0]] * 2
    assert len(blocks) == 130


def test_fnuz_means_the_same():
    weight = torch.arange(256, dtype=torch.uint8).view(FN)
    weight = weight[~weight.float().isnan()]
    converted, scale = to_fnuz(weight, torch.tensor([0.5]))
    assert converted.dtype == FNUZ
    assert torch.equal(converted.float() * scale, weight.float() * 0.5)


@pytest.mark.parametrize("config", [TENSOR, BLOCKS], ids=["tensor", "blocks"])
@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_all_ranks_make_the_whole(config, size):
    blocks = config is BLOCKS
    parts = [stored(160, 200, blocks), stored(80, 200, blocks), stored(80, 200, blocks)]
    layers = [QKVParallelLinear(200, 40, 4, 2, context=context(config, rank, size)) for rank in range(size)]
    for layer in layers:
        assert layer.weight.num_shards == layer.weight_scale.num_shards == 3
        for shard_id, (values, scales, _) in enumerate(parts):
            load(layer, values, scales, shard_id)
    cut = [meaning(layer).split([160 // size, 80 // size, 80 // size]) for layer in layers]
    for shard_id, (_, _, meant) in enumerate(parts):
        assert torch.equal(torch.cat([part[shard_id] for part in cut]), meant)


@pytest.mark.parametrize("config", [TENSOR, BLOCKS], ids=["tensor", "blocks"])
def test_merged_parts_in_one_tensor(config):
    layer = MergedColumnParallelLinear(130, [150, 150], context=context(config))
    values, scales, meant = stored(300, 130, config is BLOCKS)
    load(layer, values, scales)
    assert torch.equal(meaning(layer), meant)


@pytest.mark.parametrize("config", [TENSOR, BLOCKS], ids=["tensor", "blocks"])
def test_row_parallel(config):
    values, scales, meant = stored(100, 512, config is BLOCKS)
    layers = [RowParallelLinear(512, 100, context=context(config, rank, 2)) for rank in range(2)]
    for layer in layers:
        load(layer, values, scales)
    assert torch.equal(torch.cat([meaning(layer) for layer in layers], 1), meant)


def test_a_cut_inside_of_a_group_is_refused():
    with pytest.raises(ModelLoadError, match=r"tensor_parallel_size=2 cuts x.in_features=320 inside of a group"):
        RowParallelLinear(320, 100, context=context(BLOCKS, 0, 2), prefix="x")
    with pytest.raises(ModelLoadError, match="experts is not supported yet"):
        FusedMoE(4, 2, 128, 128, renormalize=True, context=context(BLOCKS))


@pytest.mark.parametrize("config", [TENSOR, BLOCKS], ids=["tensor", "blocks"])
@pytest.mark.parametrize("fp8", [FN, FNUZ])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_quantized_rows(config, fp8, bias):
    layer = ReplicatedLinear(300, 70, bias=bias, context=context(config, fp8_dtype=fp8))
    values, scales, meant = stored(70, 300, config is BLOCKS)
    load(layer, values, scales)
    if bias:
        layer.bias.data.normal_()
    layer.process_weights_after_loading()
    x = torch.randn(5, 300)
    rows = quant.quantize(x, *layer.method.row_format)
    expected = F.linear(dequantize(*rows, layer.method.row_format.group_size), meant, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(QuantizedRows(*rows)), layer(x))
    assert (layer(x) - F.linear(x, meant, layer.bias)).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no C++ compiler")
def test_cpu_multiplies_as_the_reference_does(dtype, group_size):
    weight, scales = quant.quantize(torch.randn(50, 300), FN, group_size)
    rows = quant.quantize(torch.randn(7, 300), FN, group_size)
    bias = torch.randn(50).to(dtype)
    results = []
    for backend in ("torch", "cpu"):
        prepared = get_op("prepare_quant_weight", (backend,))(weight, scales, group_size, dtype)
        multiply = get_op("quant_linear", (backend,))
        results.append(multiply(*rows, prepared, scales, bias, group_size, 50, dtype))
    assert results[0].dtype == results[1].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (results[1] - results[0]).abs().max() <= tolerance * results[0].abs().max()


@pytest.mark.parametrize("config", [TENSOR, BLOCKS], ids=["tensor", "blocks"])
def test_a_norm_quantizes_for_the_layer_that_it_feeds(config):
    made = context(config, fuses_norm_quant=True)
    layer = ReplicatedLinear(300, 70, context=made)
    fused, plain = (RMSNorm(300, 1e-5, context=made, feeds=feeds) for feeds in (layer, None))
    for norm in (fused, plain):
        norm.weight.data.fill_(0.7)
    x, residual = torch.randn(5, 300), torch.randn(5, 300)
    expected = quant.quantize(plain(x), *layer.method.row_format)
    got = fused(x)
    assert torch.equal(got.values.float(), expected[0].float())
    assert torch.equal(got.scales, expected[1])
    got, total = fused(x.clone(), residual.clone())
    assert torch.equal(total, x + residual)
    assert torch.equal(got.scales, quant.quantize(plain(x + residual), *layer.method.row_format)[1])
