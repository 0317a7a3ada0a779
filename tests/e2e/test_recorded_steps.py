"""Decodes recorded on a CPU have the tokens of plain steps, and are replayed unless somebody turned graphs off."""

import subprocess
import sys

import pytest
import torch
from tiny_models import make_checkpoint

from atom.compilation import recorded_steps
from atom.config import CompilationConfig, config_from_kwargs
from atom.kernels import unavailable_reason
from atom.model_engine.engine_client import make_client
from atom.model_engine.protocol import EngineRequest
from atom.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="the C++ kernels can't be built here")
LENGTHS = [7, 19, 1, 33, 16, 40]


@pytest.fixture
def replays(monkeypatch):
    """Sizes of replayed steps."""
    from atom.kernels.cpu.recording import Recorded

    sizes = []
    replay = Recorded.replay
    monkeypatch.setattr(Recorded, "replay", lambda self, s: (sizes.append(len(s.input_ids)), replay(self, s))[1])
    return sizes


def run(path, *, compilation=None, **settings):
    """Greedy tokens of requests that come and go; some are sampled, with penalties."""
    client = make_client(
        config_from_kwargs(
            path,
            compilation_config=compilation or CompilationConfig(),
            device="cpu",
            max_model_len=96,
            max_num_batched_tokens=48,
            **{"torch_dtype": "float32", "num_kvcache_blocks": 60} | settings,
        )
    )
    generator = torch.Generator().manual_seed(3)
    outputs = {}
    for i, length in enumerate(LENGTHS):
        params = SamplingParams(
            temperature=0.8 if i % 3 == 2 else 0, presence_penalty=0.5 * (i % 2), max_tokens=5 + 4 * i, ignore_eos=True,
            seed=i, logprobs=2 if i == 1 else None,
        )  # fmt: skip
        prompt = torch.randint(0, 150, (length,), generator=generator).tolist()
        client.add_request(
            EngineRequest(request_id=str(i), prompt_token_ids=prompt, sampling_params=params, arrival_time=0.0)
        )
        for out in client.step():
            outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
    while client.has_unfinished():
        for out in client.step():
            outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
    return outputs


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"torch_dtype": "bfloat16"}),
        ("llama", {"kv_cache_dtype": "fp8"}),
        ("llama", {"kv_cache_block_size": 1, "num_kvcache_blocks": 900}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
)
def test_same_tokens(family, settings, replays, tmp_path):
    path = str(make_checkpoint(family, tmp_path))
    expected = run(path, **settings, enforce_eager=True)
    assert not replays
    assert run(path, **settings) == expected
    assert set(replays) >= {1, 2, 3}


@pytest.mark.parametrize(
    "off", [{"cudagraph_mode": "NONE"}, {"use_cudagraph": False}, {"cudagraph_capture_sizes": [2]}]
)
def test_turned_off_or_limited_like_graphs(off, replays, tmp_path):
    run(str(make_checkpoint("llama", tmp_path)), compilation=CompilationConfig(**off))
    assert set(replays) <= ({1, 2} if "cudagraph_capture_sizes" in off else set())


def test_a_model_with_other_ops_runs_as_it_is(replays, tmp_path, monkeypatch):
    reasons = []
    monkeypatch.setattr(recorded_steps.logger, "debug", lambda message, *args: reasons.append(message % args))
    path = str(make_checkpoint("qwen3_moe", tmp_path))
    assert run(path) == run(path, enforce_eager=True)
    assert not replays
    assert len(reasons) == 1
    assert "is not one of the CPU kernels" in reasons[0]


def test_compiled_models_decode_alike(replays, tmp_path):
    path = str(make_checkpoint("qwen3", tmp_path))
    level_3 = CompilationConfig(level=3, use_inductor=False, cache_dir=str(tmp_path / "cache"))
    assert run(path, compilation=level_3) == run(path, enforce_eager=True)
    assert replays


def test_recording_imports_no_compiler():
    """Dynamo takes 1.5 s to import, in the middle of a first answer."""
    program = (
        "import sys; from atom import LLM, SamplingParams; "
        "LLM(model='smollm2', max_model_len=64, num_kvcache_blocks=8).generate(['a'], SamplingParams(max_tokens=4)); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
