import dataclasses

import pytest
import torch
from transformers import PretrainedConfig

from atom.config import QuantizationConfig
from atom.quant_spec import LayerQuantConfig, QuantType, parse_quant_config, quant_dtype
from atom.utils.errors import ConfigError

FP8, FP4, I8, I4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2, torch.int8, torch.int4


def quantization(config, dtype="bfloat16", **hf):
    hf_config = PretrainedConfig(dtype=dtype, **hf)
    if config is not None:
        hf_config.quantization_config = config
    return QuantizationConfig(hf_config)


def quark(scheme="per_channel", dtype="fp8_e4m3", dynamic=True, **weight):
    spec = {"weight": {"qscheme": scheme, "dtype": dtype, **weight}}
    if dynamic is not None:
        spec["input_tensors"] = {"is_dynamic": dynamic}
    return spec


def compressed(weights, targets=("Linear",), inputs=None, **more):
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


def test_layer_spec_defaults_and_is_frozen():
    spec = LayerQuantConfig()
    assert (spec.quant_type, spec.quant_dtype, spec.is_dynamic, spec.quant_method) == (
        QuantType.No, torch.bfloat16, True, "",
    )  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.quant_method = "x"


def test_names_of_types_and_dtypes():
    assert {t.name for t in QuantType} == {
        "No", "per_Token", "per_1x128", "per_1x32", "per_128x128", "per_Tensor",
    }  # fmt: skip
    assert [quant_dtype(k) for k in ("fp8", "fp4x2", "i8", "i4x2")] == [FP8, FP4, I8, I4]


def test_an_unquantized_checkpoint():
    config = quantization(None, "float16")
    assert not config.is_quantized
    assert config.get_name() == ""
    assert config.get_layer_quant_config("model.layers.0.mlp.up_proj") == LayerQuantConfig(QuantType.No, torch.float16)
    assert QuantizationConfig().torch_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (quark("per_channel"), (QuantType.per_Token, FP8, True)),
        (quark("per_tensor", dynamic=False), (QuantType.per_Tensor, FP8, False)),
        (quark("per_tensor", dynamic=None), (QuantType.per_Tensor, FP8, True)),
        (quark("per_group", "fp4"), (QuantType.per_1x32, FP4, True)),
        (quark("per_group", "fp4", group_size=32), (QuantType.per_1x32, FP4, True)),
        (quark("per_group", "int4", group_size=128), (QuantType.per_1x128, I4, True)),
        (quark("per_channel", "int8"), (QuantType.per_Token, I8, True)),
        (quark("per_tensor", "mxfp4"), (QuantType.per_1x32, FP4, True)),
    ],
)
def test_quark_global(spec, expected):
    config = quantization({"quant_method": "quark", "global_quant_config": spec})
    found = config.global_quant_config
    assert (found.quant_type, found.quant_dtype, found.is_dynamic) == expected
    assert found.quant_method == config.quant_method == config.get_name() == "quark"


def test_quark_layers_override_and_exclusions_win():
    config = quantization(
        {
            "quant_method": "quark",
            "global_quant_config": quark("per_group", "fp4"),
            "layer_quant_config": {
                "*.self_attn.*": quark("per_channel"),
                "model.layers.1.*": quark("per_tensor"),
                "*.gate": {"weight": None},
            },
            "exclude": ["lm_head", "re:.*layers\\.3\\..*", "model.layers.4.mlp", "*.router"],
        },
        "float16",
    )

    def type_of(name):
        return config.get_layer_quant_config(name).quant_type

    assert type_of("model.layers.0.mlp.up_proj") is QuantType.per_1x32
    assert type_of("model.layers.0.self_attn.q_proj") is QuantType.per_Token
    assert type_of("model.layers.1.self_attn.q_proj") is QuantType.per_Token  # the first pattern that matches
    assert type_of("model.layers.1.mlp.up_proj") is QuantType.per_Tensor
    assert type_of("model.layers.0.gate") is QuantType.No
    for name in ("lm_head", "model.layers.3.self_attn.q_proj", "model.layers.4.mlp.up_proj", "model.layers.0.router"):
        assert config.get_layer_quant_config(name) == LayerQuantConfig(QuantType.No, torch.float16)
    assert type_of("model.lm_head_norm") is QuantType.per_1x32
    assert type_of("model.layers.40.mlp.up_proj") is QuantType.per_1x32
    assert [p for p, _ in config._parsed.layer_pattern_specs] == ["*.self_attn.*", "model.layers.1.*", "*.gate"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (compressed({"num_bits": 8, "type": "float", "strategy": "channel"}), (QuantType.per_Token, FP8, True)),
        (compressed({"num_bits": 8, "type": "int"}), (QuantType.per_Token, I8, True)),
        (compressed({"num_bits": 8, "type": "float", "strategy": "tensor"}, inputs={"dynamic": False}),
         (QuantType.per_Tensor, FP8, False)),
        (compressed({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
         (QuantType.per_1x128, I4, True)),
        (compressed({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
         (QuantType.per_1x32, FP4, True)),
        (compressed({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
         (QuantType.per_1x128, FP8, True)),
        ({"quant_method": "compressed-tensors", "num_bits": 8}, (QuantType.per_Token, I8, True)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
         (QuantType.per_1x128, FP8, True)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, (QuantType.per_Tensor, FP8, False)),
        ({"quant_method": "custom", "weight_dtype": "int8", "granularity": "channel"}, (QuantType.per_Token, I8, True)),
        ({"quant_method": "custom", "dtype": "fp8", "group_size": 32}, (QuantType.per_1x32, FP8, True)),
        ({"quant_method": "mxfp4"}, (QuantType.per_1x32, FP4, True)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, (QuantType.per_1x128, I4, True)),
        ({"quant_method": "custom", "weights": {"num_bits": 8, "type": "float"}}, (QuantType.per_Tensor, FP8, True)),
    ],
)  # fmt: skip
def test_other_formats(config, expected):
    found = quantization(config).global_quant_config
    assert (found.quant_type, found.quant_dtype, found.is_dynamic) == expected
    assert found.quant_method == config["quant_method"]


def test_compressed_groups_that_name_layers_override():
    config = compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, ignore=["lm_head"])
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj", "model.layers.0.mlp.up_proj"],
        "weights": {"num_bits": 8, "type": "int"},
    }
    parsed = quantization(config)
    assert parsed.get_layer_quant_config("model.layers.5.mlp.down_proj").quant_dtype is I8
    assert parsed.get_layer_quant_config("model.layers.0.mlp.up_proj").quant_dtype is I8
    assert parsed.get_layer_quant_config("model.layers.1.mlp.up_proj").quant_dtype is FP8
    assert parsed.get_layer_quant_config("lm_head").quant_type is QuantType.No


def test_modules_not_to_convert_are_excluded():
    config = quantization({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    assert config.exclude_layers == ["model.layers.*.self_attn", "lm_head"]
    assert config.get_layer_quant_config("model.layers.2.self_attn").quant_type is QuantType.No


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "fp8", "group_size": 64},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "quark", "global_quant_config": quark("per_moon")},
        {"quant_method": "quark", "global_quant_config": quark("per_tensor", "complex64")},
        {"quant_method": "quark", "global_quant_config": {"weight": [{}, {}]}},
        compressed({"num_bits": 3, "type": "int"}),
        [1],
    ],
)
def test_what_is_not_understood_is_an_error_in_one_line(config):
    with pytest.raises(ConfigError, match="quantization_config") as info:
        parse_quant_config(config)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "mapping",
    [
        {"q_proj": "qkv_proj", "k_proj": "qkv_proj"},
        {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k")},
        {"qkv_proj": ["q_proj", "k_proj"]},
    ],
)
def test_remapping_to_fused_layers(mapping):
    config = quantization(
        {
            "quant_method": "quark",
            "global_quant_config": quark(),
            "layer_quant_config": {"*.k_proj": quark("per_tensor")},
            "exclude": ["layers.0.q_proj", "layers.0.k_proj", "re:layers\\.1\\.q_proj$", "my_q_proj"],
        }
    )
    config.remap_layer_name(PretrainedConfig(), mapping)
    assert config.exclude_layers == ["layers.0.qkv_proj", "re:layers\\.1\\.qkv_proj$", "my_q_proj"]
    assert config.get_layer_quant_config("layers.0.qkv_proj").quant_type is QuantType.No
    assert config.get_layer_quant_config("layers.1.qkv_proj").quant_type is QuantType.No
    assert config.get_layer_quant_config("layers.2.qkv_proj").quant_type is QuantType.per_Tensor


@pytest.mark.parametrize(("rank", "expected"), [(1536, "layers.0.fused_qkv_a_proj"), (None, "layers.0.q_a_proj")])
def test_remapping_of_deepseek(rank, expected):
    config = quantization({"quant_method": "quark", "global_quant_config": quark(), "exclude": ["layers.0.q_a_proj"]})
    hf_config = PretrainedConfig(q_lora_rank=rank)
    hf_config.model_type = "deepseek_v3"
    config.remap_layer_name(hf_config)
    assert config.exclude_layers == [expected]


def test_hash_tells_configs_apart():
    base = {"quant_method": "quark", "global_quant_config": quark(), "exclude": ["a"]}
    same = {"exclude": ["a"], "global_quant_config": quark(), "quant_method": "quark"}
    first = quantization(base).compute_hash()
    assert len(first) == 64
    assert quantization(same).compute_hash() == first
    others = [
        quantization(None), quantization(base, "float16"), quantization({**base, "exclude": ["b"]}),
        quantization({**base, "global_quant_config": quark("per_tensor")}),
    ]  # fmt: skip
    assert len({first, *(c.compute_hash() for c in others)}) == 5
    changed = quantization(base)
    changed.exclude_layers.append("b")
    assert changed.compute_hash() != first
