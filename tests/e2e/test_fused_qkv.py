"""ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION changes no token, at any level and in any graph mode."""

import importlib

import pytest
import torch
from test_compilation import RecordingCapturer, run
from tiny_models import make_checkpoint

from atom.kernels import OPS, get_op, unavailable_reason
from atom.model_engine import model_runner
from atom.platforms.cpu import CpuPlatform

SWITCH = "ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request, tmp_path_factory):
    return str(make_checkpoint(request.param, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def expected(checkpoint):
    return run(checkpoint)


@pytest.mark.parametrize(("level", "mode"), [(0, "NONE"), (0, "FULL"), (2, "NONE"), (3, "NONE"), (3, "PIECEWISE")])
def test_same_tokens(checkpoint, expected, level, mode, monkeypatch, tmp_path):
    calls = []
    fused = get_op("qk_norm_rope_cache")
    for backend in CpuPlatform.kernel_backends:
        if unavailable_reason(backend):
            continue
        module = importlib.import_module(f"atom.kernels.{backend}.{OPS['qk_norm_rope_cache']}")
        if module.qk_norm_rope_cache is fused:
            monkeypatch.setattr(module, "qk_norm_rope_cache", lambda *args: (calls.append(1), fused(*args)))
    monkeypatch.setenv(SWITCH, "1")
    if mode != "NONE":
        monkeypatch.setattr(CpuPlatform, "has_graphs", True)
        monkeypatch.setattr(model_runner, "make_capturer", lambda _: RecordingCapturer())
    settings = {"level": level, "cudagraph_mode": mode, "cudagraph_capture_sizes": [1, 2, 4, 16]}
    assert run(checkpoint, **settings, use_inductor=False, cache_dir=str(tmp_path)) == expected
    assert calls


@pytest.mark.slow
def test_same_tokens_compiled_and_not_from_the_other_settings_cache(checkpoint, expected, monkeypatch, tmp_path):
    torch._dynamo.reset()
    assert run(checkpoint, level=3, cache_dir=str(tmp_path)) == expected
    monkeypatch.setenv(SWITCH, "1")
    assert run(checkpoint, level=3, cache_dir=str(tmp_path)) == expected
    assert len(list(tmp_path.glob("*/manifest.json"))) == 2
