"""Choosing an attention backend: auto takes the first that can serve, a named one must be able to."""

import logging

import pytest
import torch

from atom.kernels import unavailable_reason
from atom.layers.attention.base import AttentionBackend, AttentionSpec
from atom.layers.attention.registry import get_backend, select_backend
from atom.platforms import current_platform, select_platform
from atom.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def on_cpu():
    before = current_platform().name
    select_platform("cpu")
    yield
    select_platform(before)


def spec(**changes) -> AttentionSpec:
    fields = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "scale": 0.125,
        "dtype": torch.float32,
        "block_size": 16,
        "kv_cache_dtype": torch.float32,
    }
    return AttentionSpec(**{**fields, **changes})


def test_auto_takes_the_platforms_first_that_can_serve() -> None:
    expected = "torch" if unavailable_reason("cpu") else "cpu"
    assert select_backend("auto", spec(), "cpu").name == expected


@pytest.mark.parametrize("name", ["cpu", "torch", "triton", "flashinfer", "aiter"])
def test_each_name_is_a_backend_of_that_name(name: str) -> None:
    backend = get_backend(name)
    assert issubclass(backend, AttentionBackend)
    assert backend.name == name


def test_the_reference_serves_any_device() -> None:
    assert select_backend("torch", spec(head_dim=512), "cuda").name == "torch"


@pytest.mark.parametrize(
    ("name", "device_type", "reason"), [("triton", "cpu", "not on a CPU"), ("cpu", "cuda", "not on cuda")]
)
def test_named_backend_that_cannot_serve_says_why(name: str, device_type: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        select_backend(name, spec(), device_type)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_all_reasons_are_named() -> None:
    with pytest.raises(ConfigError, match=r"CPU; head_dim=512 is over 256"):
        select_backend("triton", spec(head_dim=512), "cpu")


def test_unknown_backend_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'flashinfer2' is unknown.*auto.*triton, flashinfer, aiter"):
        select_backend("flashinfer2", spec(), "cpu")


def test_auto_passes_over_what_cannot_serve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(type(current_platform()), "attention_backends", ("triton", "torch"))
    with caplog.at_level(logging.DEBUG):
        assert select_backend("auto", spec(), "cpu").name == "torch"


@pytest.mark.parametrize("kv_cache_dtype", [torch.float32, torch.float8_e4m3fn])
def test_backend_stores_then_attends(kv_cache_dtype: torch.dtype) -> None:
    """Without earlier tokens, the first token's output is its own value."""
    from atom.layers.attention.base import AttentionMetadata, KVCache

    chosen = spec(kv_cache_dtype=kv_cache_dtype)
    cache = KVCache(*(torch.zeros(3, 16, 2, 64).to(kv_cache_dtype) for _ in range(2)))
    if kv_cache_dtype.itemsize == 1:
        cache.k_scale, cache.v_scale = torch.zeros(3, 16, 2), torch.zeros(3, 16, 2)
    query, key, value = (torch.randn(3, heads, 64) for heads in (4, 2, 2))
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, 3], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        block_table=torch.tensor([[2]], dtype=torch.int32),
        slot_mapping=torch.tensor([32, 33, 34]),
        num_decodes=0,
        max_query_len=3,
        max_seq_len=3,
    )
    output = torch.empty_like(query)
    select_backend("auto", chosen, "cpu")(chosen).forward(query, key, value, cache, metadata, output)
    tolerance = 1e-5 if kv_cache_dtype == torch.float32 else 0.1
    torch.testing.assert_close(output[0], value[0].repeat_interleave(2, dim=0), atol=tolerance, rtol=tolerance)
