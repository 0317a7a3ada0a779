"""Float8 checkpoints in an engine, against transformers with the dequantized weights and quantized rows."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compilation import LENGTHS, RecordingCapturer, run
from tiny_models import make_model
from torch import nn

from atom import LLM, SamplingParams
from atom.kernels import get_op
from atom.model_engine import model_runner
from atom.platforms.cpu import CpuPlatform
from atom.utils.errors import ModelLoadError

FP8 = torch.float8_e4m3fn
TOP = torch.finfo(FP8).max
NORM_SWITCH = "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_RMSNORM_QUANT"
SILU_SWITCH = "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_SILU_MUL_QUANT"


def compressed(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights},
        "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


# name -> (quantization_config, rows and columns of a weight that share a scale, the scales' name)
FORMATS: dict[str, tuple[dict[str, Any], tuple[int | None, int | None], str]] = {
    "tensor": (compressed({"strategy": "tensor"}), (None, None), "weight_scale"),
    "channel": (compressed({"strategy": "channel"}), (1, None), "weight_scale"),
    "block": (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        },
        (128, 128),
        "weight_scale_inv",
    ),
    "compressed-block": (
        compressed({"strategy": "block", "block_structure": [128, 128]}),
        (128, 128),
        "weight_scale",
    ),
    "some-layers": (
        compressed({"strategy": "channel"}, ignore=["lm_head", "re:.*self_attn.*", "model.layers.1.mlp.down_proj"]),
        (1, None),
        "weight_scale",
    ),
}
# No size is a multiple of 128, and the parts of merged projections begin inside of blocks.
SIZES = {"hidden_size": 160, "intermediate_size": 200, "num_attention_heads": 4, "head_dim": 40}


def is_quantized(name: str, format_name: str) -> bool:
    if format_name == "some-layers":
        return ".mlp." in name and name != "model.layers.1.mlp.down_proj"
    return name != "lm_head"


def quantize_weight(weight: torch.Tensor, block: tuple[int | None, int | None]) -> tuple[torch.Tensor, ...]:
    """(float8 weight, its scales as checkpoints hold them, what they mean), block by block."""
    rows, columns = block[0] or weight.shape[0], block[1] or weight.shape[1]
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    values = torch.empty(weight.shape, dtype=FP8)
    meant = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[part].abs().max() / TOP
            values[part] = (weight[part] / scales[i, j]).clamp(-TOP, TOP).to(FP8)
            meant[part] = values[part].float() * scales[i, j]
    return values, scales, meant


def as_quantized(columns: int | None) -> Any:
    """A hook for a layer: its rows lose what float8 can't hold."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = args[0]
        parts = x.split(columns or x.shape[-1], -1)
        scales = [part.abs().amax(-1, keepdim=True) / TOP for part in parts]
        return torch.cat([(p / s).clamp(-TOP, TOP).to(FP8).float() * s for p, s in zip(parts, scales, strict=True)], -1)

    return hook


def make_quantized(family: str, format_name: str, directory: Path) -> Any:
    """Writes a checkpoint; returns transformers' model of what it means."""
    config, block, scale_name = FORMATS[format_name]
    model = make_model(family, **SIZES)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(name, format_name):
            values, scales, module.weight.data = quantize_weight(module.weight.data, block)
            tensors[f"{name}.weight"] = values
            tensors[f"{name}.{scale_name}"] = scales.reshape(1) if block == (None, None) else scales
            module.register_forward_pre_hook(as_quantized(block[1]))
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            tensors.setdefault(name, tensor)
    save_file(tensors, directory / "model.safetensors")
    settings = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(settings))
    return model


@dataclass
class Case:
    path: str
    model: Any  # transformers'
    tokens: dict[str, list[int]]  # the engine's


@pytest.fixture(scope="module", params=[(family, name) for family in ("llama", "qwen3") for name in FORMATS], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("model")
    model = make_quantized(*request.param, directory)
    return Case(str(directory), model, run(str(directory)))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("model")
    model = make_quantized("qwen3", "block", directory)
    return Case(str(directory), model, run(str(directory)))


def test_tokens_are_those_of_transformers(case: Case) -> None:
    generator = torch.Generator().manual_seed(3)  # the prompts of `run`
    for i, length in enumerate(LENGTHS):
        prompt = torch.randint(0, 150, (length,), generator=generator)
        tokens = torch.tensor(case.tokens[str(i)])
        with torch.inference_mode():
            logits = case.model(torch.cat([prompt, tokens[:-1]]).unsqueeze(0)).logits[0, length - 1 :]
        assert logits.argmax(-1).tolist() == tokens.tolist()


@pytest.mark.parametrize("switch", [NORM_SWITCH, SILU_SWITCH])
def test_switches_change_no_token(case: Case, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "0")
    assert run(case.path) == case.tokens


@pytest.mark.parametrize("on", [True, False])
def test_switches_choose_the_fused_ops(one: Case, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    fused = ("rms_norm_quant", "add_rms_norm_quant", "silu_and_mul_quant")
    for name in fused:
        op = get_op(name)
        monkeypatch.setattr(sys.modules[op.__module__], name, recorded(name, op))
    for switch in (NORM_SWITCH, SILU_SWITCH):
        monkeypatch.setenv(switch, str(int(on)))
    assert run(one.path) == one.tokens
    assert set(calls) == (set(fused) if on else set())


@pytest.mark.parametrize(("level", "mode"), [(0, "FULL"), (2, "NONE"), (3, "PIECEWISE")])
def test_same_tokens_compiled_and_in_graphs(
    one: Case, level: int, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if mode != "NONE":
        monkeypatch.setattr(CpuPlatform, "has_graphs", True)
        monkeypatch.setattr(model_runner, "make_capturer", lambda _: RecordingCapturer())
    settings = {"level": level, "cudagraph_mode": mode, "cudagraph_capture_sizes": [1, 2, 4, 16]}
    assert run(one.path, **settings, use_inductor=False, cache_dir=str(tmp_path)) == one.tokens


@pytest.mark.slow
def test_same_tokens_from_inductor_and_not_from_the_other_settings_cache(
    one: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    assert run(one.path, level=3, cache_dir=str(tmp_path)) == one.tokens
    monkeypatch.setenv(NORM_SWITCH, "0")
    assert run(one.path, level=3, cache_dir=str(tmp_path)) == one.tokens
    assert len(list(tmp_path.glob("*/manifest.json"))) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dummy_weights_and_narrow_types_serve(one: Case, dtype: str) -> None:
    with LLM(model=one.path, device="cpu", torch_dtype=dtype, load_dummy=True, max_model_len=64) as llm:
        (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5


def test_a_missing_scale_is_named(one: Case, tmp_path: Path) -> None:
    tensors = load_file(Path(one.path) / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(Path(one.path) / "config.json", tmp_path)
    with pytest.raises(ModelLoadError, match=r"1 missing: model.layers.1.self_attn.qkv_proj.weight_scale .*k_proj"):
        run(str(tmp_path))
