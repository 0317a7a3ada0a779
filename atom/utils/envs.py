"""Every environment variable ATOM reads, evaluated when used: `envs.ATOM_DP_RANK`.

A boolean is True for "1" and False for anything else; unset, it has the default given here.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from atom.utils.errors import ConfigError
from atom.utils.logging import get_logger, log_once
from atom.utils.strict import did_you_mean

if TYPE_CHECKING:
    ATOM_DP_RANK: int
    ATOM_DP_RANK_LOCAL: int
    ATOM_DP_SIZE: int
    ATOM_DP_MASTER_IP: str
    ATOM_DP_MASTER_PORT: int
    ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION: bool
    ATOM_USE_TRITON_GEMM: bool
    ATOM_USE_TRITON_MXFP4_BMM: bool
    ATOM_ENABLE_DS_INPUT_RMSNORM_QUANT_FUSION: bool
    ATOM_ENABLE_DS_QKNORM_QUANT_FUSION: bool
    ATOM_ENABLE_ALLREDUCE_RMSNORM_FUSION: bool
    ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_RMSNORM_QUANT: bool
    ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_SILU_MUL_QUANT: bool
    ATOM_CPU_THREAD_BINDING: str
    ATOM_TORCH_PROFILER_DIR: str | None
    ATOM_PROFILER_MORE: bool
    HF_TOKEN: str | None
    CXX: str | None
    XDG_CACHE_HOME: str | None

logger = get_logger(__name__)


def _integer(default: int) -> Callable[[str], int]:
    def read(name: str) -> int:
        text = os.environ.get(name)
        if text is None:
            return default
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"environment variable {name}={text!r} must be an integer") from None

    return read


def _boolean(default: bool) -> Callable[[str], bool]:
    return lambda name: os.environ.get(name, "1" if default else "0") == "1"


def _string(default: str | None) -> Callable[[str], str | None]:
    return lambda name: os.environ.get(name) or default  # set but empty means unset


def _choice(default: str, *others: str) -> Callable[[str], str]:
    def read(name: str) -> str:
        text = os.environ.get(name) or default
        if text not in (default, *others):
            raise ConfigError(f"environment variable {name}={text!r} must be {' or '.join((default, *others))}")
        return text

    return read


environment_variables: dict[str, Callable[[str], Any]] = {
    "ATOM_DP_RANK": _integer(0),  # data-parallel rank of this process
    "ATOM_DP_RANK_LOCAL": _integer(0),  # the same within this host (SPMD mode)
    "ATOM_DP_SIZE": _integer(1),  # number of data-parallel groups
    "ATOM_DP_MASTER_IP": _string("127.0.0.1"),
    "ATOM_DP_MASTER_PORT": _integer(29500),
    "ATOM_ENABLE_QK_NORM_ROPE_CACHE_QUANT_FUSION": _boolean(False),  # meant for Qwen3-MoE
    "ATOM_USE_TRITON_GEMM": _boolean(False),
    "ATOM_USE_TRITON_MXFP4_BMM": _boolean(False),
    "ATOM_ENABLE_DS_INPUT_RMSNORM_QUANT_FUSION": _boolean(True),  # DS: DeepSeek
    "ATOM_ENABLE_DS_QKNORM_QUANT_FUSION": _boolean(True),
    "ATOM_ENABLE_ALLREDUCE_RMSNORM_FUSION": _boolean(True),
    "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_RMSNORM_QUANT": _boolean(True),
    "ATOM_LLAMA_ENABLE_AITER_TRITON_FUSED_SILU_MUL_QUANT": _boolean(True),
    "ATOM_CPU_THREAD_BINDING": _choice("none", "cores"),  # cores: a thread of the CPU kernels a physical core
    "ATOM_TORCH_PROFILER_DIR": _string(None),  # default of Config.torch_profiler_dir
    "ATOM_PROFILER_MORE": _boolean(False),  # traces also record shapes, stacks and memory
    "HF_TOKEN": _string(None),  # for gated models of the hub
    "CXX": _string(None),  # compiler of the CPU kernels
    "XDG_CACHE_HOME": _string(None),  # where compiled kernels are kept; default ~/.cache
}

_REMOVED = {"ATOM_ENFORCE_EAGER": "use the flag --enforce-eager (Config.enforce_eager)"}


def __getattr__(name: str) -> Any:
    if name in environment_variables:
        return environment_variables[name](name)
    if name in _REMOVED:
        raise AttributeError(f"{name} was removed: {_REMOVED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, environment_variables)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *environment_variables])


def is_set(name: str) -> bool:
    """Whether a known variable is in the environment, even at its default value."""
    assert name in environment_variables, name
    return name in os.environ


def warn_unknown() -> None:
    """Warn, once each, of ATOM_* variables in the environment that nothing reads."""
    for name in sorted(os.environ):
        if name in _REMOVED:
            log_once(logger, "%s was removed and does nothing: %s", name, _REMOVED[name], level=30)
        elif name.startswith("ATOM_") and name not in environment_variables:
            hint = did_you_mean(name, environment_variables)
            log_once(logger, "unknown environment variable %s%s; it does nothing", name, hint, level=30)
