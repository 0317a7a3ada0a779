"""Safetensors checkpoints into models: names, parts, experts, and what is said of damaged ones."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from stand_ins import FAMILIES, StandIn, assert_holds, make_hf_model

from atom.model_loader.loader import load_weights
from atom.model_loader.safetensors import read_safetensors
from atom.utils.errors import ModelLoadError


def save_split(weights, folder, num_files):
    """As transformers saves a model that is larger than one file."""
    names = sorted(weights)
    weight_map = {}
    for index in range(num_files):
        file = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: weights[name].contiguous() for name in names[index::num_files]}
        weight_map.update(dict.fromkeys(part, file))
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def fill(model, folder, dtype=torch.float32, **kwargs):
    stand_in = StandIn(model.config).to(dtype)
    tied = model.config.tie_word_embeddings
    load_weights(stand_in, read_safetensors(folder), tie_word_embeddings=tied, source=str(folder), **kwargs)
    return stand_in


def refuse(model, folder):
    with pytest.raises(ModelLoadError) as caught:
        fill(model, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama():
    return make_hf_model("llama")


@pytest.fixture
def weights(llama):
    return {name: value.clone() for name, value in llama.state_dict().items()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_saved_by_transformers(family, max_shard_size, tmp_path):
    model = make_hf_model(family)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "100KB")
    assert_holds(fill(model, tmp_path), model.state_dict())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_stacked_experts(family, tmp_path):
    model = make_hf_model(family)
    weights = {name.replace(".mlp.gate.", ".gate."): value for name, value in model.state_dict().items()}
    module = "block_sparse_moe" if family == "mixtral" else "mlp"
    weights = {n.replace(".gate.", f".{module}.gate.").replace(".mlp.", f".{module}."): v for n, v in weights.items()}
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    save_split(weights, tmp_path, 3)
    assert_holds(fill(model, tmp_path), model.state_dict())


def test_narrowed_to_the_models_dtype_rounding_once(llama, weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    stand_in = fill(llama, tmp_path, torch.bfloat16)
    assert_holds(stand_in, weights)
    assert {value.dtype for value in stand_in.state_dict().values()} == {torch.bfloat16}


def test_tied_head_in_the_file_is_skipped(weights, tmp_path):
    model = make_hf_model("llama", tie_word_embeddings=True)
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 7.0)
    save_file(weights, tmp_path / "model.safetensors")
    stand_in = fill(model, tmp_path)
    assert torch.equal(stand_in.lm_head.weight, weights["model.embed_tokens.weight"])
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    fill(model, tmp_path)


def test_ignored_and_renamed_names(llama, weights, tmp_path):
    weights = {f"language_model.{name}": value for name, value in weights.items()}
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["vision.patch.weight"] = torch.ones(3)
    weights["mtp.0.extra.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors")
    stand_in = StandIn(llama.config)
    stand_in.ignored_weight_patterns = (r"^mtp\.",)
    stand_in.map_weight_name = lambda name: None if name.startswith("vision.") else name.removeprefix("language_model.")
    load_weights(stand_in, read_safetensors(tmp_path))
    assert_holds(stand_in, llama.state_dict())


def test_a_fused_tensor_in_the_file_fills_all_parts(llama, weights, tmp_path):
    fused = StandIn(llama.config)
    for layer in fused.model.layers:
        param = layer.mlp.gate_up_proj.weight
        param.weight_loader = lambda param, loaded, shard_id, expert_id: param.data.copy_(loaded)
    for index in range(2):
        gate, up = (weights.pop(f"model.layers.{index}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        weights[f"model.layers.{index}.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
    save_file(weights, tmp_path / "model.safetensors")
    load_weights(fused, read_safetensors(tmp_path))
    assert_holds(fused, llama.state_dict())


def test_everything_wrong_is_listed_at_once(llama, weights, tmp_path):
    del weights["model.norm.weight"], weights["model.layers.0.self_attn.k_proj.weight"]
    del weights["model.layers.1.mlp.gate_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.v_proj.weight"] = torch.ones(3, 64)
    weights["model.embed_tokens.weight"] = torch.ones(63, 64)
    weights["model.layers.2.self_attn.q_proj.weight"] = torch.ones(64, 64)
    save_file(weights, tmp_path / "model.safetensors")
    message = refuse(llama, tmp_path)
    assert (
        "3 missing: model.layers.0.self_attn.qkv_proj.weight (parts k_proj), "
        "model.layers.1.mlp.gate_up_proj.weight, model.norm.weight; "
        "1 not in the model: model.layers.2.self_attn.q_proj.weight; "
        "2 misshapen: model.embed_tokens.weight [63, 64]: expected [64, 64] (for model.embed_tokens.weight [64, 64]), "
        "model.layers.0.self_attn.v_proj.weight [3, 64]: expected [32, 64]" in message
    )
    assert str(tmp_path) in message


def test_missing_experts_are_named_and_long_lists_are_cut(tmp_path):
    model = make_hf_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.experts.2.up_proj.weight"], weights["model.layers.1.mlp.experts.3.down_proj.weight"]
    weights |= {f"extra.{index:02d}": torch.ones(1) for index in range(25)}
    save_file(weights, tmp_path / "model.safetensors")
    message = refuse(model, tmp_path)
    assert "model.layers.0.mlp.experts.w13_weight (parts 2.up_proj)" in message
    assert "model.layers.1.mlp.experts.w2_weight (parts 3.down_proj)" in message
    assert "25 not in the model: extra.00" in message
    assert "extra.09, and 15 more" in message
    assert "extra.10" not in message


def test_integers_and_float8_are_not_read_as_numbers(llama, weights, tmp_path):
    weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    weights["lm_head.weight"] = torch.ones(64, 64).to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    message = refuse(llama, tmp_path)
    assert "model.norm.weight [64]: stored as int8, which can't be read as float32" in message
    assert "lm_head.weight [64, 64]: stored as float8_e4m3fn, which" in message


def test_dtype_unknown_to_the_engine(llama, weights, tmp_path):
    header = json.dumps({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    assert "a has dtype C64; supported are F64, F32" in refuse(llama, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: data[:100], "truncated or damaged"),
        (lambda data: b"", "truncated or damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or damaged"),
        (lambda data: data[:8] + b"}" + data[9:], "truncated or damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
    ],
)
def test_damaged_file(llama, weights, tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    path.write_bytes(change(path.read_bytes()))
    text = refuse(llama, tmp_path)
    assert message in text
    assert str(path) in text


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: [], '"weight_map"'),
        (lambda index: {}, '"weight_map"'),
        (lambda index: {"weight_map": {}}, "must map tensor names to file names"),
        (lambda index: {"weight_map": {"a": 3}}, "must map tensor names to file names"),
        (lambda index: {"weight_map": {"a": "../secret.safetensors"}}, "outside the model's folder"),
        (lambda index: {"weight_map": {"a": "/etc/passwd"}}, "outside the model's folder"),
        (lambda index: {"weight_map": {"a": ".."}}, "outside the model's folder"),
        (
            lambda index: {"weight_map": index["weight_map"] | {"b": "model-00004-of-00004.safetensors"}},
            "1 of 4 files are missing: model-00004-of-00004.safetensors",
        ),
        (
            lambda index: {"weight_map": index["weight_map"] | {"b": "model-00001-of-00003.safetensors"}},
            "places b in model-00001-of-00003.safetensors, which doesn't hold it",
        ),
    ],
)
def test_damaged_index(llama, weights, tmp_path, change, message):
    save_split(weights, tmp_path, 3)
    rewrite_index(tmp_path, change)
    assert message in refuse(llama, tmp_path)


def test_broken_index_json_and_lost_file(llama, weights, tmp_path):
    save_split(weights, tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 files are missing: model-00002-of-00003.safetensors" in refuse(llama, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert "not readable as JSON" in refuse(llama, tmp_path)


def test_several_files_without_an_index(llama, weights, tmp_path):
    save_split(weights, tmp_path, 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(weights, tmp_path / "consolidated.safetensors")  # the same weights again
    assert_holds(fill(llama, tmp_path), llama.state_dict())
    save_file({"model.norm.weight": weights["model.norm.weight"]}, tmp_path / "third.safetensors")
    assert "model.norm.weight is in both" in refuse(llama, tmp_path)


def test_no_weights_at_all(llama, tmp_path):
    assert "no weights" in refuse(llama, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "convert them to safetensors" in refuse(llama, tmp_path)


def test_progress_goes_to_stderr_only_when_wanted(llama, weights, tmp_path, capsys):
    save_file(weights, tmp_path / "model.safetensors")
    fill(llama, tmp_path, show_progress=None)  # stderr is no terminal here
    assert capsys.readouterr() == ("", "")
    fill(llama, tmp_path, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err
    assert err.endswith("s\n")
