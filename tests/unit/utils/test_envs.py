import logging

import pytest

from atom.utils import envs
from atom.utils import logging as atom_logging
from atom.utils.errors import ConfigError

BOOLEANS = {
    "ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION": False,
    "ATOM_USE_TRITON_GEMM": False,
    "ATOM_USE_TRITON_MXFP4_BMM": False,
    "ATOM_ENABLE_DS_INPUT_RMSNORM_QUANT_FUSION": True,
    "ATOM_ENABLE_DS_QKNORM_QUANT_FUSION": True,
    "ATOM_ENABLE_ALLREDUCE_RMSNORM_FUSION": True,
    "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_RMSNORM_QUANT": True,
    "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_SILU_MUL_QUANT": True,
    "ATOM_PROFILER_MORE": False,
}
VALUES = {
    "ATOM_DP_RANK": 0,
    "ATOM_DP_RANK_LOCAL": 0,
    "ATOM_DP_SIZE": 1,
    "ATOM_DP_MASTER_IP": "127.0.0.1",
    "ATOM_DP_MASTER_PORT": 29500,
    "ATOM_CPU_THREAD_BINDING": "none",
    "ATOM_TORCH_PROFILER_DIR": None,
    "HF_TOKEN": None,
    "CXX": None,
    "XDG_CACHE_HOME": None,
}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [*BOOLEANS, *VALUES]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(atom_logging, "_seen", set())


def test_the_list_and_the_defaults():
    assert {name: getattr(envs, name) for name in envs.environment_variables} == {**BOOLEANS, **VALUES}
    assert set(BOOLEANS) <= set(dir(envs))


@pytest.mark.parametrize("name", BOOLEANS)
def test_only_one_is_true(name, monkeypatch):
    for text, value in {"1": True, "0": False, "true": False, "": False, "yes": False}.items():
        monkeypatch.setenv(name, text)
        assert getattr(envs, name) is value


def test_values_are_read_when_used(monkeypatch):
    monkeypatch.setenv("ATOM_DP_RANK", "3")
    assert envs.ATOM_DP_RANK == 3
    monkeypatch.setenv("ATOM_DP_RANK", "4")
    assert envs.ATOM_DP_RANK == 4
    assert envs.is_set("ATOM_DP_RANK")
    assert not envs.is_set("ATOM_DP_SIZE")


def test_a_number_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("ATOM_DP_SIZE", "many")
    with pytest.raises(ConfigError, match="ATOM_DP_SIZE='many' must be an integer"):
        _ = envs.ATOM_DP_SIZE


def test_an_unknown_attribute_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'ATOM_DP_SIZE'"):
        _ = envs.ATOM_DP_SIZ
    with pytest.raises(AttributeError, match="--enforce-eager"):
        _ = envs.ATOM_ENFORCE_EAGER


def test_unknown_and_removed_variables_are_warned_about_once(monkeypatch, caplog):
    monkeypatch.setenv("ATOM_DP_SIZES", "2")
    monkeypatch.setenv("ATOM_ENFORCE_EAGER", "1")
    monkeypatch.setenv("ATOM_DP_RANK", "0")
    with caplog.at_level(logging.WARNING, logger="atom"):
        envs.warn_unknown()
        envs.warn_unknown()
    assert [r.getMessage() for r in caplog.records if "ATOM_DP_" in r.getMessage()] == [
        "unknown environment variable ATOM_DP_SIZES (did you mean 'ATOM_DP_SIZE'?); it does nothing"
    ]
    assert [r.levelname for r in caplog.records if "ATOM_ENFORCE_EAGER was removed" in r.getMessage()] == ["WARNING"]


def test_a_choice_names_what_it_may_be(monkeypatch):
    for text, value in {"cores": "cores", "none": "none", "": "none"}.items():
        monkeypatch.setenv("ATOM_CPU_THREAD_BINDING", text)
        assert value == envs.ATOM_CPU_THREAD_BINDING
    monkeypatch.setenv("ATOM_CPU_THREAD_BINDING", "core")
    with pytest.raises(ConfigError, match="ATOM_CPU_THREAD_BINDING='core' must be none or cores"):
        _ = envs.ATOM_CPU_THREAD_BINDING
