"""Norms that the layers reading them compute."""

from dataclasses import replace

import pytest
import torch

from atom.layers.build import BuildContext
from atom.layers.linear import ColumnParallelLinear
from atom.layers.mlp import GatedMLP
from atom.layers.norm import RMSNorm
from atom.layers.quant.base import PendingNorm

CONTEXT = BuildContext(dtype=torch.float32, kv_cache_dtype=torch.float32, block_size=16, max_model_len=64)
FUSED = replace(CONTEXT, fuses_norm_linear=True)


def loaded(layer):
    generator = torch.Generator().manual_seed(0)
    for param in layer.parameters():
        param.copy_(torch.randn(param.shape, generator=generator))
    for module in layer.modules():
        getattr(module, "process_weights_after_loading", lambda: None)()
    return layer


def layers(context):
    with torch.inference_mode():
        return (
            loaded(ColumnParallelLinear(24, 40, bias=True, context=context)),
            loaded(GatedMLP(24, 40, "silu", context=context, prefix="mlp")),
            loaded(GatedMLP(24, 40, "silu", bias=True, context=context, prefix="mlp")),
        )


@pytest.mark.parametrize("index", range(3))
def test_a_layer_computes_the_norm_that_it_reads(index):
    x, residual = torch.randn(5, 24), torch.randn(5, 24)
    with torch.inference_mode():
        plain, fused = layers(CONTEXT)[index], layers(FUSED)[index]
        first = getattr(fused, "gate_up_proj", fused)
        norm = loaded(RMSNorm(24, 1e-5, context=CONTEXT, feeds=first))
        pending = loaded(RMSNorm(24, 1e-5, context=FUSED, feeds=first))
        assert isinstance(pending(x), PendingNorm)
        assert torch.equal(fused(pending(x)), plain(norm(x)))
        y, total = norm(x.clone(), residual.clone())
        waiting, sums = pending(x.clone(), residual.clone())
        assert torch.equal(fused(waiting), plain(y))
        assert torch.equal(sums, total)


def test_other_norms_do_not_wait():
    x = torch.randn(5, 24)
    with torch.inference_mode():
        layer = layers(FUSED)[0]
        assert isinstance(loaded(RMSNorm(24, 1e-5, context=FUSED))(x), torch.Tensor)
        norm = loaded(RMSNorm(24, 1e-5, context=FUSED, feeds=layer))
        expected = layer(norm(x))
        compiled = torch.compile(lambda x: layer(norm(x)), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
