import os
from pathlib import Path

import pytest

from atom.compilation.cache import CompilationCache, cache_key
from atom.compilation.plan import Plan, Step

PLAN = Plan(
    num_registers=3,
    inputs=[(0, "input_ids")],
    steps=[Step(inputs=[0], outputs=[1], dead=[], piece="abc")],
    output=1,
)


@pytest.fixture
def cache(tmp_path):
    cache = CompilationCache(str(tmp_path), "key")
    building = cache.start()
    (building / "abc.any.bin").write_bytes(b"code")
    cache.finish(building, PLAN, {"abc": "def forward(): ..."})
    return cache


def test_what_was_stored_is_loaded(cache):
    manifest = cache.load()
    assert manifest.plan == PLAN
    assert list(manifest.files) == ["abc.any.bin"]
    assert manifest.graphs == {"abc": "def forward(): ..."}
    assert os.listdir(cache.root) == ["key"]


def test_nothing_stored_is_nothing_loaded(tmp_path):
    assert CompilationCache(str(tmp_path), "key").load() is None


@pytest.mark.parametrize("damage", ["change", "remove", "manifest", "writable", "escape"])
def test_a_damaged_cache_is_not_used(cache, damage):
    artifact: Path = cache.directory / "abc.any.bin"
    manifest: Path = cache.directory / "manifest.json"
    if damage == "change":
        artifact.write_bytes(b"other")
    elif damage == "remove":
        artifact.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-5])
    elif damage == "writable":
        cache.directory.chmod(0o777)
    else:
        manifest.write_text(manifest.read_text().replace("abc.any.bin", "../abc.any.bin"))
    assert cache.load() is None


def test_the_key_depends_on_every_fact():
    assert cache_key({"a": 1}) == cache_key({"a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})
