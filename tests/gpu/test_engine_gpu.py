"""The engine on a GPU: greedy tokens equal transformers' in float32, whatever runs them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from tiny_models import FAMILIES, make_checkpoint, make_model

from atom.config import CompilationConfig, config_from_kwargs
from atom.model_engine.engine_client import make_client
from atom.model_engine.protocol import EngineRequest
from atom.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu

LENGTHS = [23, 1, 2, 15, 16, 17, 31, 33, 48, 64, 65, 70, 7, 90, 40, 3, 55]
NUM_OUTPUT = 32
MODES = {
    "eager": {"level": 0, "use_cudagraph": False},
    "full": {"level": 0, "cudagraph_mode": "FULL"},
    "full-decode": {"level": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "dynamo": {"level": 1},
    "once": {"level": 2, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "piecewise": {"level": 3},
    "piecewise-copy": {"level": 3, "cudagraph_copy_inputs": True},
    "full-and-piecewise": {"level": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"},
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    path = make_checkpoint(request.param, tmp_path_factory.mktemp("model"))
    model = make_model(request.param)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    expected = []
    for prompt in prompts:
        tokens, cache, ids = [], None, torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(NUM_OUTPUT):
                out = model(ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                tokens.append(int(out.logits[0, -1].argmax()))
                ids = torch.tensor([[tokens[-1]]])
        expected.append(tokens)
    return str(path), prompts, expected


def run(path, prompts, compilation, cache_dir, dtype="float32", temperature=0.0, **settings):
    config = config_from_kwargs(
        path,
        torch_dtype=dtype,
        device="cuda",
        max_model_len=192,
        max_num_seqs=32,
        compilation_config=CompilationConfig(
            **compilation, cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32], cache_dir=str(cache_dir)
        ),
        **{"num_kvcache_blocks": 512, **settings},
    )
    client = make_client(config)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=NUM_OUTPUT, ignore_eos=True, seed=i)
        client.add_request(
            EngineRequest(request_id=str(i), prompt_token_ids=prompt, sampling_params=params, arrival_time=0.0)
        )
    outputs = {}
    while client.has_unfinished():
        for out in client.step():
            outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
    stats = client.stats()
    client.close()
    assert stats["kv_cache_usage"] == 0
    return [outputs[str(i)] for i in range(len(prompts))], stats


@pytest.mark.parametrize("mode", MODES)
def test_levels_and_graph_modes(family, mode, tmp_path):
    path, prompts, expected = family
    assert run(path, prompts, MODES[mode], tmp_path)[0] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 33},
        {"enable_prefix_caching": True},
        {"kv_cache_block_size": 1, "num_kvcache_blocks": 8192},
        {"kv_cache_block_size": 64},
        {"num_kvcache_blocks": 24},
        {"attention_backend": "torch"},
    ],
    ids=["chunked", "prefix", "block-1", "block-64", "preempt", "torch"],
)
def test_scheduling_on_the_device(family, settings, tmp_path):
    path, prompts, expected = family
    outputs, stats = run(path, prompts, MODES["full-decode"], tmp_path, **settings)
    assert outputs == expected
    assert (stats["preemptions"] > 0) == (settings.get("num_kvcache_blocks") == 24)


def test_a_seed_gives_the_same_tokens_in_any_mode(family, tmp_path):
    path, prompts, _ = family
    runs = [run(path, prompts, MODES[m], tmp_path / m, temperature=0.7)[0] for m in ("eager", "full-decode")]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kv_cache_dtype", ["bf16", "fp8"])
def test_bfloat16_runs(family, kv_cache_dtype, tmp_path):
    path, prompts, expected = family
    outputs, _ = run(path, prompts, MODES["full-decode"], tmp_path, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    first = sum(got[0] == want[0] for got, want in zip(outputs, expected, strict=True))
    assert first >= len(prompts) * 0.6
    assert all(len(got) == NUM_OUTPUT for got in outputs)
