"""Models in parts, and cut to their first layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[3] / "scripts"))

from gpu_suite_parts.text import GOLDEN, compare, find_model, write
from split_model import cut, join, split

from atom.utils.gguf_file import read_gguf
from atom.utils.model_path import resolve_model

SCRIPT = str(Path(__file__).parents[3] / "scripts" / "split_model.py")


@pytest.fixture(scope="module")
def whole():
    return Path(resolve_model("smollm2").gguf_file)


@pytest.fixture(scope="module")
def cut_file(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "cut.gguf"
    cut(whole, 10, out)
    return out


def test_parts_make_the_file_again(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * 1000)
    parts = split(path, 100_000)
    assert [part.stat().st_size for part in parts] == [100_000, 100_000, 56_000]
    (tmp_path / "elsewhere").mkdir()
    assert join(path, tmp_path / "elsewhere").read_bytes() == path.read_bytes()
    parts[1].write_bytes(b"x" * 100_000)
    with pytest.raises(ValueError, match="part001 is missing or damaged"):
        join(path)
    done = subprocess.run([sys.executable, SCRIPT, "join", str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("split_model: ")
    assert done.stderr.count("\n") == 1


def test_cut_keeps_the_first_layers_and_all_metadata(whole, cut_file):
    before, after = read_gguf(whole), read_gguf(cut_file)
    assert after.metadata == before.metadata | {"llama.block_count": 10}
    kept = [n for n in before.tensors if not n.startswith("blk.") or int(n.split(".")[1]) < 10]
    assert list(after.tensors) == kept
    assert cut_file.stat().st_size < 56 << 20
    old, new = whole.read_bytes(), cut_file.read_bytes()
    for name in ("token_embd.weight", "blk.9.ffn_down.weight", "output_norm.weight"):
        a, b = before.tensors[name], after.tensors[name]
        assert (a.shape, a.ggml_type) == (b.shape, b.ggml_type)
        assert old[a.offset : a.offset + 1024] == new[b.offset : b.offset + 1024]


def test_cut_model_writes_what_is_expected_of_it(cut_file):
    layers, found = write(str(cut_file), "cpu", "float32", graphs=False)
    good, detail = compare(found, json.loads(GOLDEN.read_text())[str(layers)], "float32")
    assert good, detail


def test_too_many_layers_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="has 30 layers; 31 can't be taken"):
        cut(whole, 31, tmp_path / "out.gguf")


def test_the_suite_joins_parts_that_it_finds(cut_file, tmp_path):
    copy = tmp_path / cut_file.name
    copy.write_bytes(cut_file.read_bytes()[: 1 << 20])
    split(copy, 600_000)
    copy.unlink()
    assert find_model(str(tmp_path)) == str(copy)
    assert copy.stat().st_size == 1 << 20
