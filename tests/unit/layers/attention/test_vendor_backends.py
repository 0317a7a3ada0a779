"""FlashInfer and AITER get every step in their terms: with their documented meaning the result is the reference's."""

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vendor_fakes
from attention_steps import DIM, HEADS, KV_HEADS, MAX_LEN, compare_step, make_cache, prepare_step

pytest.importorskip("triton")

from atom.compilation.cuda_graph import GraphCapturer, GraphDispatcher
from atom.config import CUDAGraphMode
from atom.forward_context import get_forward_context
from atom.kernels import aiter as aiter_package
from atom.kernels import flashinfer as flashinfer_package
from atom.kernels import unavailable_reason
from atom.kernels.flashinfer.attention import workspace_bytes
from atom.layers.attention.backends.aiter import AiterAttentionBackend, machine_reasons
from atom.layers.attention.backends.flashinfer import FlashInferAttentionBackend, count_pages, list_pages
from atom.layers.attention.backends.torch import TorchAttentionBackend
from atom.layers.attention.base import AttentionSpec
from atom.layers.attention.registry import select_backend
from atom.model_engine.graph_runner import GraphRunner
from atom.model_engine.static_inputs import StaticInputs
from atom.platforms.cpu import CpuPlatform
from atom.utils import packages
from atom.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def plain_cache_writes(monkeypatch):
    """Triton's interpreter is slow, and its cache writes have their own tests."""
    for backend in (FlashInferAttentionBackend, AiterAttentionBackend):
        monkeypatch.setattr(backend, "kernel_backends", ("torch",))


NUM_BLOCKS = 800
# (cached tokens, new ones) of each request in a step
STEPS = {
    "decodes": [(8, 1), (64, 1), (15, 1), (0, 1), (63, 1)],
    "a prompt": [(0, 40)],
    "prompts": [(0, 16), (0, 3), (0, 65)],
    "chunks": [(16, 5), (70, 64), (1, 2)],
    "mixed": [(8, 1), (0, 57), (20, 6), (100, 1), (0, 17)],
}


def make_spec(**changes) -> AttentionSpec:
    fields = {
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "scale": 0.3,
        "dtype": torch.float32,
        "block_size": 16,
        "kv_cache_dtype": torch.float32,
    }
    return AttentionSpec(**{**fields, **changes})


def prepare(lengths, block_size, static=None):
    return prepare_step(lengths, block_size, NUM_BLOCKS, static=static)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("name", STEPS)
def test_flashinfer_equals_the_reference(name, block_size, window, monkeypatch):
    vendor_fakes.install_flashinfer(monkeypatch)
    spec = make_spec(block_size=block_size, sliding_window=window)
    backend = FlashInferAttentionBackend(spec)
    backend.planner = backend.make_planner()
    for packed in (False, True):
        step = prepare(STEPS[name], block_size)
        backend.planner.plan(step.metadata)
        compare_step(backend, TorchAttentionBackend(spec), step, NUM_BLOCKS, packed)
    # Wrappers are kept, and one plan does for both kinds of a step at most.
    kinds = {new == 1 for _, new in STEPS[name]}
    assert [w.num_plans for w in vendor_fakes.PagedWrapper.made] == [2] * len(kinds)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("name", STEPS)
def test_aiter_equals_the_reference(name, window, monkeypatch):
    vendor_fakes.install_aiter(monkeypatch)
    spec = make_spec(sliding_window=window)
    for packed in (False, True):
        backend = AiterAttentionBackend(spec)
        compare_step(backend, TorchAttentionBackend(spec), prepare(STEPS[name], 16), NUM_BLOCKS, packed)


class Replays(GraphCapturer):
    """A replay does the captured work again, on what its memory holds then, and into the same results."""

    def capture(self, call):
        result = call().clone()
        return lambda: result.copy_(call()), result


class TwoKinds:
    """Three layers as a model: two alike, one with a window. Queries, keys and values come from the position."""

    def __init__(self, backend_class, block_size):
        self.layers = {}
        for i, window in enumerate((0, 9, 0)):
            backend = backend_class(make_spec(block_size=block_size, sliding_window=window))
            self.layers[str(i)] = SimpleNamespace(backend=backend, cache=make_cache(NUM_BLOCKS, block_size, seed=i))

    def __call__(self, input_ids, positions):
        total = torch.zeros(len(positions), HEADS * DIM)
        for i, layer in enumerate(self.layers.values()):
            columns = torch.arange((HEADS + 2 * KV_HEADS) * DIM) + 17 * i
            qkv = torch.sin(positions[:, None] + 1.3 * columns).view(len(positions), -1, DIM)
            output = torch.zeros(len(positions), HEADS, DIM)
            metadata = get_forward_context().attn_metadata
            layer.backend.forward(*qkv.split([HEADS, KV_HEADS, KV_HEADS], 1), layer.cache, metadata, output)
            total += output.flatten(1)
        return total


def make_runner(backend_class, block_size, sizes):
    """A runner, and where its steps are to be written."""
    model = TwoKinds(backend_class, block_size)
    static = None
    if sizes:
        dispatcher = GraphDispatcher(CUDAGraphMode.FULL_DECODE_ONLY, sizes)
        static = StaticInputs(CpuPlatform(), dispatcher, 8, MAX_LEN, block_size)
    runner = GraphRunner(model, model.layers, static, Replays(), copy_inputs=False)
    if sizes:
        runner.capture()
    return runner, static


@pytest.mark.parametrize(
    ("backend_class", "block_size"),
    [
        (FlashInferAttentionBackend, 1),
        (FlashInferAttentionBackend, 16),
        (FlashInferAttentionBackend, 64),
        (AiterAttentionBackend, 16),
    ],
)
def test_captured_decodes_equal_the_reference(backend_class, block_size, monkeypatch):
    vendor_fakes.install_flashinfer(monkeypatch)
    vendor_fakes.install_aiter(monkeypatch)
    runner, static = make_runner(backend_class, block_size, [1, 2, 4])
    reference, _ = make_runner(TorchAttentionBackend, block_size, [])
    steps = [
        [(8, 1), (100, 1), (31, 1)],  # padded
        [(190, 1), (191, 1), (180, 1), (175, 1)],
        [(0, 1)],
        [(8, 1), (0, 20), (9, 1)],  # not captured
        [(15, 1), (16, 1), (17, 1)],
        [(1, 1)] * 6,  # more than the largest
    ]
    for lengths in steps:
        want = reference.run(prepare(lengths, block_size))
        got = runner.run(prepare(lengths, block_size, static))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layers_alike_share_plans(monkeypatch):
    vendor_fakes.install_flashinfer(monkeypatch)
    runner, static = make_runner(FlashInferAttentionBackend, 16, [2, 4])
    graphs = list(vendor_fakes.PagedWrapper.made)
    assert [(w.graph_size, w.window_left) for w in graphs] == [(4, -1), (4, 8), (2, -1), (2, 8)]
    addresses = [[b.data_ptr() for b in w.buffers] for w in graphs]
    runner.run(prepare([(8, 1), (100, 1), (31, 1)], 16, static))
    runner.run(prepare([(8, 1), (9, 30)], 16, static))
    assert [w.num_plans for w in graphs] == [2, 2, 1, 1]
    others = vendor_fakes.PagedWrapper.made[len(graphs) :]
    assert [(w.num_plans, w.window_left) for w in others] == [(1, -1), (1, -1), (1, 8), (1, 8)]
    assert addresses == [[b.data_ptr() for b in w.buffers] for w in graphs]


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_pages_list_each_requests_blocks(block_size):
    seq_lens = np.array([1, block_size, block_size + 1, 3 * block_size, 0])
    table = torch.arange(100, 115, dtype=torch.int32).view(5, 3)
    indptr, last_page_len = count_pages(seq_lens, block_size, 7)
    assert np.diff(indptr).tolist() == [1, 1, 2, 3, 1, 1, 1]
    assert last_page_len.tolist() == [1, block_size, 1, block_size, 1, 1, 1]
    assert indptr.dtype == last_page_len.dtype == np.int32
    listed = list_pages(table, torch.from_numpy(seq_lens).int(), block_size, int(indptr[5]), 2)
    assert listed.tolist() == [100, 103, 106, 107, 109, 110, 111, 112, 0, 0]
    assert listed.dtype == torch.int32


def test_the_workspace_holds_what_a_planner_may_take():
    # By hand, for 32 query and 8 key heads on 132 processors: tiles of 16 rows, 128 + 511 for 512 requests.
    assert workspace_bytes(32, 8, 128, 132, 512) >= 4 * 32 * 16 * (128 + 511) * (128 + 1)
    # Without graphs, prompts' tiles of 128 rows, 33 at a time.
    assert workspace_bytes(32, 8, 128, 132, 0) >= 4 * 32 * 128 * 33 * (128 + 1)


@pytest.fixture
def versions(monkeypatch):
    """Installed distributions, by name, and nothing else."""
    installed: dict[str, str] = {}

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(packages, "version", version)
    for cached in (packages.missing_reason, unavailable_reason):
        cached.cache_clear()
    yield installed
    for cached in (packages.missing_reason, unavailable_reason):
        cached.cache_clear()


SERVED = {"head_dim": 128, "dtype": torch.bfloat16, "kv_cache_dtype": torch.bfloat16}


def refusal(name, device_type="cuda", **changes) -> str:
    with pytest.raises(ConfigError) as error:
        select_backend(name, make_spec(**{**SERVED, **changes}), device_type)
    text = str(error.value)
    assert text.startswith(f"attention_backend='{name}' can't be used: ")
    assert "\n" not in text
    return text.partition(": ")[2]


def test_without_flashinfer_the_remedy_is_named(versions):
    remedy = 'pip install "atom-inference[flashinfer]"'
    assert refusal("flashinfer") == f"the package flashinfer-python is not installed: {remedy}"
    assert "it runs on an NVIDIA GPU, not on a CPU; the package" in refusal("flashinfer", "cpu")


@pytest.mark.parametrize("version", ["0.6.7.post3", "0.5.3", "0.8.0", "1.0"])
def test_flashinfer_of_another_version_is_refused(version, versions):
    versions["flashinfer-python"] = version
    reason = f"flashinfer-python {version} is installed, but 0.6.8 or newer, below 0.8, is needed: pip install"
    assert refusal("flashinfer").startswith(reason)


@pytest.mark.parametrize("version", ["0.6.8", "0.6.18.post1", "0.7.2rc5", "0.7.2.post1+cu130"])
def test_flashinfer_is_chosen_when_it_is_here(version, versions, monkeypatch):
    vendor_fakes.install_flashinfer(monkeypatch)
    versions["flashinfer-python"] = version
    assert select_backend("flashinfer", make_spec(**SERVED), "cuda") is FlashInferAttentionBackend


def test_a_flashinfer_that_does_not_import_says_why(versions, monkeypatch):
    versions["flashinfer-python"] = "0.7.0"
    monkeypatch.setitem(vendor_fakes.sys.modules, "flashinfer", None)
    assert refusal("flashinfer").startswith("flashinfer can't be imported (ModuleNotFoundError: ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"dtype": torch.float32, "kv_cache_dtype": torch.float32},
            "it computes in bfloat16 or float16, not in float32",
        ),
        (
            {"kv_cache_dtype": torch.float8_e4m3fn},
            "its float8_e4m3fn caches have one scale, ATOM's one a token and head",
        ),
        ({"head_dim": 96}, "head_dim=96 is not one of 64, 128, 256"),
    ],
)
def test_flashinfer_refuses_what_it_cannot_serve(changes, reason, versions, monkeypatch):
    vendor_fakes.install_flashinfer(monkeypatch)
    versions["flashinfer-python"] = "0.7.0"
    assert refusal("flashinfer", **changes) == reason


def test_the_wrong_vendors_gpu_is_named(versions, monkeypatch):
    assert refusal("aiter") == "it runs on AMD GPUs, with a ROCm build of torch"
    monkeypatch.setattr(torch.version, "hip", "7.0.1")
    unavailable_reason.cache_clear()
    assert refusal("flashinfer") == "it runs on NVIDIA GPUs, not on AMD ones"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"kv_cache_dtype": torch.float8_e4m3fnuz}, "its float8_e4m3fnuz caches have one scale"),
        ({"block_size": 64}, "kv_cache_block_size=64 is not 16"),
        ({"head_dim": 64}, "head_dim=64 is not 128"),
        ({"num_heads": 34}, "17 query heads a key head are over 16"),
    ],
)
def test_aiter_refuses_what_it_cannot_serve(changes, reason, versions, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0.1")
    vendor_fakes.install_aiter(monkeypatch)
    versions["amd-aiter"] = "0.1.12.post1"
    if reason:
        assert refusal("aiter", **changes).startswith(reason)
    else:
        assert select_backend("aiter", make_spec(**SERVED), "cuda") is AiterAttentionBackend


def test_an_old_aiter_is_refused(versions, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0.1")
    assert refusal("aiter") == (
        "the package amd-aiter is not installed: build 0.1.12 or newer from github.com/ROCm/aiter"
    )
    versions["amd-aiter"] = "0.1.7.post2.dev18"
    for cached in (packages.missing_reason, unavailable_reason):
        cached.cache_clear()
    assert refusal("aiter").startswith("amd-aiter 0.1.7.post2.dev18 is installed, but 0.1.12 or newer, below 0.2, is")


def test_where_aiter_runs():
    assert machine_reasons("gfx942:sramecc+:xnack-", "7.2.0") == []
    assert machine_reasons("gfx950", "7.1.1") == []
    assert machine_reasons("gfx1100", "7.1.1") == ["gfx1100 is not one of gfx942, gfx950"]
    assert "ROCm 7.2.26 compiles its prompt kernel wrongly" in machine_reasons("gfx950:xnack-", "7.2.26")[0]


def test_the_extra_asks_for_the_versions_that_are_accepted():
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"]["flashinfer"]
    expected = f"flashinfer-python>={flashinfer_package.AT_LEAST},<{flashinfer_package.BELOW};"
    assert requirement.startswith(expected)
    assert "aiter" not in project["optional-dependencies"], f"is {aiter_package.AT_LEAST} on PyPI now?"
