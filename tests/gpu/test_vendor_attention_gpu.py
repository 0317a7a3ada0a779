"""FlashInfer and AITER on a GPU: a layer's output and an engine's tokens are those of our Triton kernels."""

import sys
from pathlib import Path

import pytest
import torch
from engine_cases import MODES, SCHEDULING, drain, engine, request

sys.path.append(str(Path(__file__).parents[1] / "unit/layers/attention"))
from attention_steps import prepare_step

from atom.layers.attention.base import AttentionSpec, KVCache
from atom.layers.attention.registry import get_backend

pytestmark = pytest.mark.gpu

STEPS = {
    "decodes": [(8, 1), (64, 1), (0, 1), (3000, 1)],
    "prompts": [(0, 16), (0, 3), (0, 700)],
    "chunks": [(16, 5), (700, 640), (1, 2)],
    "mixed": [(8, 1), (0, 57), (20, 6), (1000, 1), (0, 1500)],
}


def make_spec(name: str, **changes) -> AttentionSpec:
    fields = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 128,
        "scale": 0.1,
        "dtype": torch.bfloat16,
        "block_size": 16,
        "kv_cache_dtype": torch.bfloat16,
    }
    spec = AttentionSpec(**{**fields, **changes})
    reasons = get_backend(name).unsupported_reasons(spec, "cuda")
    if reasons:
        pytest.skip("; ".join(reasons))
    return spec


@pytest.mark.parametrize("step_name", STEPS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 100}, {"head_dim": 64}, {"block_size": 1}, {"block_size": 64}, {"dtype": torch.float16}],
    ids=str,
)
@pytest.mark.parametrize("name", ["flashinfer", "aiter"])
def test_a_layer_gives_what_tritons_does(name, changes, step_name):
    if "dtype" in changes:
        changes = {**changes, "kv_cache_dtype": changes["dtype"]}
    spec = make_spec(name, **changes)
    device = torch.device("cuda", 0)
    lengths = STEPS[step_name]
    num_blocks = sum(-(-sum(pair) // spec.block_size) for pair in lengths)
    step = prepare_step(lengths, spec.block_size, num_blocks, 4096, device)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=spec.dtype)

    cached = [random(num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim) for _ in "kv"]
    qkv = random(len(step.positions), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    outputs = []
    for one in ("triton", name):
        with device:
            backend = get_backend(one)(spec)
        backend.planner = backend.make_planner()
        if backend.planner is not None:
            backend.planner.plan(step.metadata)
            torch.cuda.set_sync_debug_mode("error")  # once its kernels are compiled, planning never waits
            try:
                backend.planner.plan(step.metadata)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        output = qkv.new_zeros(len(step.positions), spec.num_heads, spec.head_dim)
        parts = qkv.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        backend.forward(*parts, KVCache(*(c.clone() for c in cached)), step.metadata, output)
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=2e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("scheduling", ["", "chunked", "prefix", "preempt"])
@pytest.mark.parametrize("mode", ["eager", "full", "full-decode", "full-and-piecewise"])
@pytest.mark.parametrize("name", ["flashinfer", "aiter"])
def test_an_engines_tokens_are_those_with_triton(name, mode, scheduling, model, tmp_path):
    make_spec(name)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 160, (n,), generator=generator).tolist() for n in (23, 1, 16, 33, 64, 90, 40, 3, 55)]
    answers = []
    for one in ("triton", name):
        settings = {"torch_dtype": "bfloat16", "attention_backend": one, **SCHEDULING.get(scheduling, {})}
        with engine(model, MODES[mode], tmp_path / one, **settings) as client:
            for i, prompt in enumerate(prompts):
                client.add_request(request(i, prompt))
            answers.append(drain(client, len(prompts)))
    # bfloat16 sums in another order, so now and then another token wins; whatever follows it differs.
    same = sum(a[:8] == b[:8] for a, b in zip(*answers, strict=True))
    assert same >= len(prompts) - 2, f"only {same} of {len(prompts)} answers begin alike"
