"""Greedy tokens equal transformers' where parts of long prompts skip the paged kernel."""

import sys
from pathlib import Path

import pytest
import torch
from test_engine_matrix import client_of, greedy, run
from tiny_models import make_model

sys.path.append(str(Path(__file__).parents[1] / "unit/layers/attention"))
from attention_steps import attend_on_cpu

from atom.config import CompilationConfig, config_from_kwargs
from atom.layers.attention import long_prompts
from atom.layers.attention.backends import triton
from atom.layers.attention.long_prompts import LongPrompts
from atom.model_engine.engine_client import make_client

LENGTHS = [23, 1, 48, 90, 64, 131, 7, 70, 180, 55]
SETTINGS = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 96},
    "prefix": {"enable_prefix_caching": True, "max_num_batched_tokens": 160},
    "block-64": {"kv_cache_block_size": 64, "max_num_batched_tokens": 130},
}


@pytest.fixture(scope="module", params=["llama", "qwen2-layer-types"])
def family(request, tmp_path_factory):
    """(checkpoint, prompts, transformers' greedy continuations); the second one's first layer has a window."""
    path = str(tmp_path_factory.mktemp(request.param))
    model = make_model(request.param)
    model.save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 160, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts[-2][:80] = prompts[3][:80]
    guesses = run(client_of(path, max_model_len=200), prompts, "", 16)
    return path, prompts, greedy(model, prompts, guesses)


class Recorded(LongPrompts):
    contexts: list[int] = []

    def attend(self, part, *args):
        self.contexts.append(part.context)
        return super().attend(part, *args)


@pytest.mark.parametrize(("name", "level"), [*((name, 0) for name in SETTINGS), ("chunked", 3)])
def test_same_tokens(family, name, level, monkeypatch, tmp_path):
    path, prompts, expected = family
    backend = triton.TritonAttentionBackend
    monkeypatch.setattr(backend, "unsupported_reasons", lambda *_: [])
    monkeypatch.setattr(backend, "kernel_backends", ("torch",))
    monkeypatch.setattr(triton, "_has_fast_torch_attention", lambda spec: not spec.sliding_window)
    monkeypatch.setattr(triton, "LongPrompts", lambda: Recorded(24, 8, 64, 16, 32))
    monkeypatch.setattr(long_prompts, "attend_with_lse", attend_on_cpu)
    Recorded.contexts.clear()
    settings = {"device": "cpu", "torch_dtype": "float32", "max_model_len": 200, "attention_backend": "triton"}
    settings |= {"num_kvcache_blocks": 256} | SETTINGS[name]
    compilation = CompilationConfig(level=level, use_inductor=False, cache_dir=str(tmp_path))
    client = make_client(config_from_kwargs(path, compilation_config=compilation, **settings))
    outputs = run(client, prompts, "", 16)
    client.close()
    assert outputs == expected
    assert Recorded.contexts.count(0) >= 4
    assert (max(Recorded.contexts) > 0) == (name != "whole")
