import gguf
import numpy as np
import pytest
import torch
from stand_ins import FAMILIES, StandIn, assert_holds, make_hf_model, random_blocks, write_gguf

from atom.model_loader.gguf import read_gguf_tensors
from atom.model_loader.loader import load_weights
from atom.utils.errors import ModelLoadError
from atom.utils.gguf_file import read_gguf

WRITABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
READ_ONLY = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def encoder(qtype):
    """Matrices in `qtype` where their rows divide into its blocks, the rest in F32, as files in the wild mix them."""

    def encode(name, values):
        if values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0]:
            return values, gguf.GGMLQuantizationType.F32
        if qtype.name in READ_ONLY:
            return random_blocks(values.shape, qtype, seed=len(name) + values.size), qtype
        return gguf.quantize(values, qtype), qtype

    return encode


def load(model, path, dtype=torch.float32):
    with torch.device("cpu"):
        stand_in = StandIn(model.config).to(dtype)
    load_weights(stand_in, read_gguf_tensors(path, dtype), tie_word_embeddings=model.config.tie_word_embeddings)
    return stand_in


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_float32_file_gives_the_original_weights(family, tmp_path):
    model = make_hf_model(family)
    write_gguf(model, tmp_path / "m.gguf", encoder(gguf.GGMLQuantizationType.F32))
    assert_holds(load(model, tmp_path / "m.gguf"), model.state_dict())


def test_tied_file_has_no_output_matrix(tmp_path):
    model = make_hf_model("llama", tie_word_embeddings=True)
    write_gguf(model, tmp_path / "m.gguf", encoder(gguf.GGMLQuantizationType.F32))
    stand_in = load(model, tmp_path / "m.gguf")
    assert_holds(stand_in, model.state_dict())
    assert stand_in.lm_head.weight is stand_in.model.embed_tokens.weight


@pytest.mark.parametrize("qtype", WRITABLE + READ_ONLY)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_type_loads_as_transformers_loads_it(family, qtype, tmp_path):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # from_pretrained needs accelerate

    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    model = make_hf_model(family, **sizes)
    write_gguf(model, tmp_path / "m.gguf", encoder(gguf.GGMLQuantizationType[qtype]))
    reference = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=model)["tensors"]
    assert_holds(load(model, tmp_path / "m.gguf"), reference)


@pytest.mark.parametrize("qtype", WRITABLE + READ_ONLY)
def test_decoding_equals_the_packages_and_rounds_once(qtype, tmp_path):
    kind = gguf.GGMLQuantizationType[qtype]
    values = np.random.default_rng(0).normal(size=(37, 4096)).astype(np.float32)  # more than one chunk, and a rest
    data, _ = encoder(kind)("blk.0.attn_v.weight", values)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    writer.add_tensor("blk.0.attn_v.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (raw,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    expected = torch.tensor(gguf.dequantize(raw.data, raw.tensor_type))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (tensor,) = read_gguf_tensors(tmp_path / "m.gguf", dtype)
        assert tensor.name == "model.layers.0.self_attn.v_proj.weight"
        loaded = tensor.load()
        assert loaded.dtype == tensor.dtype == dtype
        assert torch.equal(loaded, expected.to(dtype))


def test_one_tensor_an_expert_as_old_files_have_it(tmp_path):
    model = make_hf_model("mixtral")
    write_gguf(model, tmp_path / "new.gguf", encoder(gguf.GGMLQuantizationType.F32))
    new = gguf.GGUFReader(tmp_path / "new.gguf")
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for tensor in new.tensors:
        if tensor.name.endswith("_exps.weight"):
            for expert, data in enumerate(tensor.data):
                writer.add_tensor(tensor.name.replace("_exps", f".{expert}"), np.ascontiguousarray(data))
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_holds(load(model, tmp_path / "old.gguf"), model.state_dict())


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(make_hf_model("llama"), path, encoder(gguf.GGMLQuantizationType.F16))
    return path


def test_header_equals_the_packages_reader(small_file):
    ours, theirs = read_gguf(small_file), gguf.GGUFReader(small_file)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == expected
    assert [(t.name, list(t.shape), t.ggml_type, t.offset) for t in ours.tensors.values()] == [
        (t.name, t.shape.tolist()[::-1], t.tensor_type.value, t.data_offset) for t in theirs.tensors
    ]
    assert ours.get("block_count") == 2


def damaged(small_file, tmp_path, change):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(bytearray(small_file.read_bytes())))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:10], "too few"),
        (lambda data: data[:200], "truncated or damaged"),
        (lambda data: data[:-100], "truncated; .* ends at byte"),
        (lambda data: b"GGML" + data[4:], "another format"),
        (lambda data: data[:4] + b"\x07\0\0\0" + data[8:], "version 7"),
        (lambda data: data[:4] + b"\0\0\0\x03" + data[8:], "big-endian"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "truncated or damaged"),
        (lambda data: data.replace(b"llama", b"lamma"), "architecture 'lamma' is not supported; supported are llama"),
    ],
)
def test_damage_is_one_clear_line(small_file, tmp_path, change, message):
    path = damaged(small_file, tmp_path, change)
    with pytest.raises(ModelLoadError, match=message) as caught:
        list(read_gguf_tensors(path, torch.float32))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_random_damage_to_the_header_never_escapes_as_another_error(small_file, tmp_path):
    original = small_file.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(small_file).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(4, header)] = rng.integers(256)
        path = damaged(small_file, tmp_path, lambda _, data=data: bytes(data))
        try:
            for tensor in read_gguf_tensors(path, torch.float32):
                assert tensor.shape
        except ModelLoadError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
        read_gguf.__globals__["_read"].cache_clear()
    assert refused > 100


def test_missing_file_and_undecodable_type(small_file, tmp_path):
    with pytest.raises(ModelLoadError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    writer = gguf.GGUFWriter(tmp_path / "heads.gguf", "llama")
    writer.add_head_count(3)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="doesn't divide into 3 heads"):
        list(read_gguf_tensors(tmp_path / "heads.gguf", torch.float32))
    with pytest.raises(ModelLoadError, match="type I32, which can't be decoded"):
        list(read_gguf_tensors(tmp_path / "m.gguf", torch.float32))


def test_unknown_tensor_is_reported_as_surplus(tmp_path):
    model = make_hf_model("llama")
    write_gguf(model, tmp_path / "m.gguf", encoder(gguf.GGMLQuantizationType.F32))
    extra = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for tensor in extra.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, dtype=np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))  # computed from the config instead
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"1 not in the model: blk\.0\.attn_sinks\.weight$"):
        load(model, tmp_path / "x.gguf")
