"""The whole way: resolve, build, fill, process."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from stand_ins import StandIn, assert_holds, make_hf_model
from torch import nn

from atom.layers.build import BuildContext
from atom.model_loader import loader
from atom.model_loader.dummy import fill_dummy
from atom.model_loader.loader import build_model, fill_with_dummies, finalize, load_model
from atom.utils.errors import ModelLoadError


@pytest.fixture
def registry(monkeypatch):
    """The stand-in in place of the real models, whose own tests load them."""
    module = ModuleType("atom.models.registry")
    module.get_model_class = lambda hf_config: StandIn
    monkeypatch.setitem(sys.modules, "atom.models.registry", module)


def context(dtype):
    return BuildContext(dtype=dtype, kv_cache_dtype=dtype, block_size=16, max_model_len=128)


def config(model, hf_config, load_dummy=False):
    return SimpleNamespace(model=str(model), hf_config=hf_config, load_dummy=load_dummy, trust_remote_code=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_folder(registry, tmp_path, dtype):
    model = make_hf_model("qwen3")
    model.save_pretrained(tmp_path)
    loaded = load_model(config(tmp_path, model.config), torch.device("cpu"), context(dtype))
    assert_holds(loaded, model.state_dict())
    assert {param.dtype for param in loaded.parameters()} == {dtype}
    assert not any(param.requires_grad for param in loaded.parameters())
    assert not loaded.training
    assert torch.get_default_dtype() == torch.float32


def test_embedded_gguf(registry):
    from atom.model_loader.gguf import read_gguf_tensors
    from atom.utils.hf_config import load_hf_config
    from atom.utils.model_path import resolve_model

    try:
        path = resolve_model("smollm2")
    except ModelLoadError as error:
        pytest.skip(str(error))
    hf_config = load_hf_config(path)
    loaded = load_model(config("smollm2", hf_config), torch.device("cpu"), context(torch.bfloat16))
    stored = {tensor.name: tensor for tensor in read_gguf_tensors(path.gguf_file, torch.bfloat16)}
    for name in ("model.embed_tokens.weight", "model.layers.29.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(loaded.state_dict()[name], stored[name].load())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_default_dtype_is_restored_when_building_fails():
    class Broken(nn.Module):
        def __init__(self, hf_config, context):
            super().__init__()
            assert torch.empty(1).dtype == torch.bfloat16
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build_model(Broken, None, torch.device("cpu"), context(torch.bfloat16))
    assert torch.get_default_dtype() == torch.float32


def test_layers_process_their_weights_once_after_loading():
    calls = []

    class Packs(nn.Module):
        def process_weights_after_loading(self):
            calls.append(self)

    first, shared = Packs(), Packs()
    finalize(nn.ModuleList([first, shared, nn.ModuleDict({"again": shared})]))
    assert calls == [first, shared]


def test_dummy_needs_no_files_and_repeats_itself(registry):
    hf_config = make_hf_model("qwen3_moe").config
    first, second = (
        load_model(config("/nowhere", hf_config, load_dummy=True), torch.device("cpu"), context(torch.bfloat16))
        for _ in range(2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert value.isfinite().all()
        if "norm" in name:
            assert 0 < (value - 1).abs().max() < 0.05
        else:
            assert value.float().std().item() == pytest.approx(0.02, rel=0.2)
    layers = first.model.layers
    assert not torch.equal(layers[0].mlp.experts.w13_weight, layers[1].mlp.experts.w13_weight)


def test_dummy_numbers_depend_on_the_name_alone():
    alone = torch.empty(100)
    fill_dummy("layers.1.weight", alone)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(10, 10), nn.Module()])})
    model["layers"][1].weight = nn.Parameter(torch.empty(100))
    fill_with_dummies(model)
    assert torch.equal(model["layers"][1].weight, alone)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.bool])
def test_dummies_of_quantized_dtypes(dtype):
    tensors = [torch.empty(64, 64, dtype=dtype) for _ in range(2)]
    for tensor in tensors:
        fill_dummy("weight", tensor)
    assert torch.equal(tensors[0].float(), tensors[1].float())
    assert tensors[0].float().isfinite().all()
    assert dtype is torch.bool or tensors[0].float().std() > 0
    scale = torch.empty(4)
    fill_dummy("x.weight_scale", scale)
    assert torch.equal(scale, torch.ones(4))


def test_persistent_buffers_are_filled_and_the_first_error_ends_the_run(tmp_path):
    from atom.model_loader.checkpoint import CheckpointTensor

    model = nn.Module()
    model.register_buffer("correction_bias", torch.zeros(3))
    model.register_buffer("cache", torch.zeros(3), persistent=False)

    def tensor(name, load):
        return CheckpointTensor(name, (3,), torch.float32, load)

    loader.load_weights(model, [tensor("correction_bias", lambda: torch.arange(3.0))])
    assert model.correction_bias.tolist() == [0, 1, 2]

    def fail():
        raise ModelLoadError("disk on fire")

    with pytest.raises(ModelLoadError, match="on fire"):
        loader.load_weights(model, [tensor("correction_bias", fail)])
    with pytest.raises(ModelLoadError, match="a second source of correction_bias"):
        loader.load_weights(model, [tensor("correction_bias", lambda: torch.ones(3))] * 2)
