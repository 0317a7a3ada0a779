"""Float8 checkpoints in an engine: tokens are those of transformers, with any switch, compiled and in graphs."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from float8_models import FORMATS, make_quantized
from safetensors.torch import load_file, save_file
from test_compilation import LENGTHS, RecordingCapturer, run

from atom import LLM, SamplingParams
from atom.kernels import get_op
from atom.model_engine import model_runner
from atom.platforms.cpu import CpuPlatform
from atom.utils.errors import ModelLoadError

NORM_SWITCH = "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_RMSNORM_QUANT"
SILU_SWITCH = "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_SILU_MUL_QUANT"


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
