import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from atom.config import Config, get_generation_config, get_hf_config
from atom.utils.errors import ModelLoadError

HIDDEN, HEADS, VOCAB = 64, 4, 40


@pytest.fixture
def write(tmp_path):
    """write(arch, entries, tensors, drop) -> path of a GGUF file of a tiny model's header and few tensors."""

    def build(arch="llama", entries=None, tensors=(), drop=(), head_dim=16):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, arch)
        values = {
            "block_count": 2, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": 96,
            "attention.head_count": HEADS, "attention.head_count_kv": 2, "rope.dimension_count": head_dim,
            "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0,
        } | (entries or {})  # fmt: skip
        for key, value in values.items():
            if key in drop or value is None:
                continue
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(key if "." in key and key.split(".")[0] in ("tokenizer", "general") else f"{arch}.{key}", value)
        for name, array in {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32), **dict(tensors)}.items():
            if name not in drop:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    return build


def test_llama(write):
    config = get_hf_config(
        write(entries={"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "general.file_type": 1})
    )
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCAB, HIDDEN, 96)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, HEADS, 2)
    assert (config.head_dim, config.max_position_embeddings, config.tie_word_embeddings) == (16, 512, True)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.bos_token_id, config.eos_token_id, config.dtype) == (1, 2, torch.float16)
    assert not config.attention_bias


def test_head_dim_tying_and_bias_follow_the_file(write):
    config = get_hf_config(
        write(
            entries={"attention.key_length": 24},
            tensors={
                "output.weight": np.zeros((VOCAB, HIDDEN), np.float32),
                "blk.0.attn_q.bias": np.zeros(96, np.float32),
            },
        )
    )
    assert (config.head_dim, config.tie_word_embeddings, config.attention_bias) == (24, False, True)
    assert config.dtype is None
    assert get_hf_config(write(drop=["rope.dimension_count"])).head_dim == HIDDEN // HEADS


def test_other_architectures(write):
    experts = {"expert_count": 4, "expert_used_count": 2}
    assert get_hf_config(write("qwen2")).model_type == "qwen2"
    assert get_hf_config(write("qwen3")).architectures == ["Qwen3ForCausalLM"]
    mixtral = get_hf_config(write(entries=experts))
    assert (mixtral.architectures, mixtral.num_local_experts, mixtral.num_experts_per_tok) == (
        ["MixtralForCausalLM"],
        4,
        2,
    )
    assert mixtral.sliding_window is None
    moe = get_hf_config(write("qwen3moe", entries={**experts, "expert_feed_forward_length": 32}))
    assert (moe.model_type, moe.num_experts, moe.moe_intermediate_size) == ("qwen3_moe", 4, 32)
    assert moe.norm_topk_prob


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
    ],
)
def test_rope_scaling(write, entries, expected):
    found = get_hf_config(write(entries=entries)).rope_parameters
    assert {key: found[key] for key in expected} == expected
    assert found["rope_theta"] == 10000.0


def test_llama3_scaling_is_recovered_from_its_table(write):
    reference = get_hf_config(write(head_dim=64, entries={"rope.freq_base": 500000.0}))
    inverse, _ = ROPE_INIT_FUNCTIONS["linear"](_with_rope(reference, {"rope_type": "linear", "factor": 1.0}), "cpu")
    rope = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](_with_rope(reference, rope), "cpu")
    table = (inverse / scaled).numpy().astype(np.float32)
    found = get_hf_config(
        write(
            head_dim=64,
            entries={"rope.freq_base": 500000.0, "context_length": 131072},
            tensors={"rope_freqs.weight": table},
        )
    ).rope_parameters
    assert {k: found[k] for k in rope} == rope
    with pytest.raises(ModelLoadError, match="rope_freqs"):
        get_hf_config(write(head_dim=64, tensors={"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)}))
    plain = get_hf_config(write(head_dim=64, tensors={"rope_freqs.weight": np.ones(32, np.float32)}))
    assert plain.rope_parameters["rope_type"] == "default"


def _with_rope(config, rope):
    config.rope_parameters = {"rope_theta": 500000.0, **rope}
    return config


def test_stop_tokens_are_the_tokenizers_ends(write):
    model = write(
        entries={
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2,
        }
    )  # fmt: skip
    assert get_generation_config(model).eos_token_id == [2, 7]
    assert Config(model).stop_token_ids == [2, 7]
    assert Config(write()).stop_token_ids == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"arch": "mamba"}, "'mamba' is not supported"),
        ({"drop": ["embedding_length"]}, r"lacks llama\.embedding_length"),
        ({"drop": ["token_embd.weight"]}, r"token_embd\.weight is missing"),
        ({"entries": {"rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
    ],
)
def test_what_cannot_be_translated_is_named(write, arguments, problem):
    with pytest.raises(ModelLoadError, match=problem) as info:
        get_hf_config(write(**arguments))
    assert "\n" not in str(info.value)


def test_embedded_model():
    config = Config("smollm2")
    hf = config.hf_config
    assert (hf.model_type, hf.vocab_size, hf.hidden_size, hf.num_hidden_layers) == ("llama", 49152, 576, 30)
    assert (hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim, hf.intermediate_size) == (9, 3, 64, 1536)
    assert (hf.tie_word_embeddings, hf.rope_parameters["rope_theta"]) == (True, 100000.0)
    assert (config.max_model_len, config.torch_dtype) == (8192, torch.bfloat16)
    assert (config.bos_token_id, config.eos_token_id, config.stop_token_ids) == (1, 2, [2])
