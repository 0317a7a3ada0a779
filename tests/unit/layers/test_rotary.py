from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from atom.layers.build import BuildContext
from atom.layers.rotary import get_rope
from atom.utils.errors import ModelLoadError

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
}


def context(max_model_len=256):
    return BuildContext(dtype=torch.float32, kv_cache_dtype=torch.float32, block_size=16, max_model_len=max_model_len)


def llama_config(parameters):
    return LlamaConfig(
        hidden_size=96,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters=dict(parameters),
    )


def rotated(rope, positions, query, key):
    query, key = query.clone(), key.clone()
    rope(positions, query, key)
    return query, key


@pytest.mark.parametrize("name", SCALINGS)
def test_rotates_as_transformers_does(name):
    config = llama_config(SCALINGS[name])
    before = dict(config.rope_parameters)
    positions = torch.tensor([0, 1, 2, 63, 64, 200, 255])
    query, key = torch.randn(7, 4, 32), torch.randn(7, 2, 32)
    got = rotated(get_rope(config, 32, context=context()), positions, query, key)
    assert config.rope_parameters == before

    cos, sin = LlamaRotaryEmbedding(config)(query, positions[None])
    expected = apply_rotary_pos_emb(query[None].transpose(1, 2), key[None].transpose(1, 2), cos, sin)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn"])
def test_configs_of_older_versions_mean_the_same(name):
    new = SCALINGS[name]
    scaling = {key: value for key, value in new.items() if key not in ("rope_theta", "rope_type")}
    old = SimpleNamespace(
        rope_theta=new["rope_theta"],
        rope_scaling={"type": name, **scaling} if name != "default" else None,
        max_position_embeddings=256,
        head_dim=None,
    )
    ours = get_rope(old, 32, context=context()).cos_sin_cache
    assert torch.equal(ours, get_rope(llama_config(new), 32, context=context()).cos_sin_cache)


def test_table_covers_max_model_len_in_float32_whatever_the_default_dtype():
    expected = get_rope(llama_config(LLAMA3), 32, context=context(40)).cos_sin_cache
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = get_rope(llama_config(LLAMA3), 32, context=context(40)).cos_sin_cache
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.shape == (40, 32)
    assert table.dtype is torch.float32
    assert torch.equal(table, expected)


def test_dynamic_scaling_is_that_of_the_longest_context():
    config = llama_config(SCALINGS["dynamic"])
    plain = llama_config({"rope_type": "default", "rope_theta": 10000.0})
    within = get_rope(config, 32, context=context(256)).cos_sin_cache
    assert torch.equal(within, get_rope(plain, 32, context=context(256)).cos_sin_cache)

    rope = LlamaRotaryEmbedding(config)
    cos, sin = rope(torch.zeros(1), torch.arange(512)[None])  # transformers rescales when it sees 512 tokens
    beyond = get_rope(config, 32, context=context(512)).cos_sin_cache
    torch.testing.assert_close(beyond, torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"rope_type": "longrope", "factor": 2.0},
            r"rope_type='longrope' is not supported; supported: default",
        ),
        ({"rope_type": "linear"}, r"rope_type='linear' lack 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, r"lack 'low_freq_factor'"),
    ],
)
def test_unusable_scalings(parameters, message):
    config = SimpleNamespace(rope_parameters=parameters, rope_theta=10000.0, max_position_embeddings=256)
    with pytest.raises(ModelLoadError, match=message):
        get_rope(config, 32, context=context())
