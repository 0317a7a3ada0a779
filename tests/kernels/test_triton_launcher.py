"""Launches without Triton: which share a compiled kernel, what it is passed, and when Triton launches after all."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from atom.kernels.triton import launcher
from atom.kernels.triton.launcher import Launcher, launch_key

ROOT = Path(__file__).parents[2]
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU kernels are interpreted")


def _kernel(x, bias, out, size, stride, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    pass


def triton_key(launch: tuple[Any, ...]) -> str:
    """What Triton tells launches apart by, as text."""
    pointers, numbers, constants, options = launch
    function = JITFunction(_kernel, do_not_specialize=["stride"])
    bind = create_function_from_signature(function.signature, function.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, rest = bind(*pointers, *numbers, *constants, **options)
    return f"{specialization} {rest}"


def tensor(dtype: torch.dtype, elements_off: int) -> torch.Tensor:
    return torch.empty(64, dtype=dtype)[elements_off:]


_types = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
_tensors = st.builds(tensor, _types, st.sampled_from([0, 1, 16]))
_pointers = st.tuples(_tensors, st.none() | _tensors, _tensors)
_MOST, _LEAST = 2**31 - 1, -(2**31)
_integers = st.sampled_from([0, 1, 2, 16, 17, -1, -16, _MOST, _MOST + 1, _MOST + 17, _LEAST, _LEAST - 1])
_numbers = st.tuples(_integers, _integers, st.floats(-1, 1) | st.booleans() | st.sampled_from([0, 1]))
_options = st.fixed_dictionaries(
    {"num_warps": st.sampled_from([1, 4])},
    optional={"num_stages": st.sampled_from([1, 3]), "launch_pdl": st.booleans()},
)
_launches = st.builds(
    lambda pointers, numbers, block, overlap, options: (pointers, numbers, (block,), {**options, "OVERLAP": overlap}),
    _pointers,
    _numbers,
    st.sampled_from([16, 32]),
    st.booleans(),
    _options,
)


def exchanged(one: tuple[Any, ...], other: tuple[Any, ...], which: int) -> tuple[Any, ...]:
    """`one` with one of its arguments from `other`."""
    pointers, numbers, constants, options = one
    if which < 3:
        return (*pointers[:which], other[0][which], *pointers[which + 1 :]), numbers, constants, options
    if which < 6:
        which -= 3
        return pointers, (*numbers[:which], other[1][which], *numbers[which + 1 :]), constants, options
    return pointers, numbers, *((other[2], options) if which == 6 else (constants, other[3]))


@settings(max_examples=500, deadline=None)
@given(_launches, _launches, st.integers(0, 7))
def test_launches_that_triton_tells_apart_have_keys_of_their_own(
    one: tuple[Any, ...], other: tuple[Any, ...], which: int
) -> None:
    for different in (other, exchanged(one, other, which)):
        if triton_key(one) != triton_key(different):
            assert launch_key(0, *one)[0] != launch_key(0, *different)[0]


_OPTIONS = {"num_warps": 4, "OVERLAP": False}
BASE = ((tensor(torch.float32, 0), None, tensor(torch.float32, 0)), (16, 5, 0.5), (32,), _OPTIONS)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (0, (tensor(torch.float32, 1), None, BASE[0][2])),  # not aligned
        (0, (tensor(torch.bfloat16, 0), None, BASE[0][2])),
        (0, (BASE[0][0], tensor(torch.float32, 0), BASE[0][2])),
        (1, (17, 5, 0.5)),
        (1, (1, 5, 0.5)),
        (1, (2**32, 5, 0.5)),
        (1, (16, 2**31, 0.5)),  # not specialized on, but no longer 32 bits
        (1, (16, 5, 1)),
        (2, (64,)),
        (3, {"num_warps": 8, "OVERLAP": False}),
        (3, {"num_warps": 4, "OVERLAP": True}),
    ],
)
def test_one_difference_makes_another_key(part: int, value: Any) -> None:
    changed = (*BASE[:part], value, *BASE[part + 1 :])
    assert triton_key(changed) != triton_key(BASE)
    assert launch_key(0, *changed)[0] != launch_key(0, *BASE)[0]


def test_one_is_unlike_other_integers() -> None:
    one, two = ((BASE[0], (size, 5, 0.5), *BASE[2:]) for size in (1, 2))
    assert triton_key(one) != triton_key(two)
    assert launch_key(0, *one)[0] != launch_key(0, *two)[0]


def test_key_ignores_what_triton_does_not_compile_for() -> None:
    again = ((tensor(torch.float32, 0), None, tensor(torch.float32, 16)), (48, 7, 0.25), *BASE[2:])
    assert triton_key(again) == triton_key(BASE)
    assert launch_key(0, *again)[0] == launch_key(0, *BASE)[0]


def test_each_device_has_keys_of_its_own() -> None:
    assert launch_key(0, *BASE)[0] != launch_key(1, *BASE)[0]


def test_addresses_are_the_tensors() -> None:
    x, _, out = BASE[0]
    assert launch_key(0, *BASE)[1] == [x.data_ptr(), None, out.data_ptr()]


@triton.jit
def _fill_kernel(out, value, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), value)


@ON_CPU
def test_interpreter_launches_itself() -> None:
    launch = Launcher(_fill_kernel)
    for value in (1, 2):
        out = torch.zeros(16, dtype=torch.int32)
        launch((1, 1, 1), (out,), (value,), (16,))
        assert out.tolist() == [value] * 16
    assert not launch._compiled


def test_triton_launches_for_whoever_set_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = JITFunction(_kernel)
    runtime = triton.knobs.runtime
    assert not launcher._is_observed(kernel)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(runtime, name)
        chain.add(print)
        try:
            assert launcher._is_observed(kernel)
        finally:
            chain.remove(print)
        with monkeypatch.context() as patch:
            patch.setattr(runtime, name, None)
            assert not launcher._is_observed(kernel)
            patch.setattr(runtime, name, print)
            assert launcher._is_observed(kernel)
    kernel.add_pre_run_hook(print)
    assert launcher._is_observed(kernel)


@pytest.mark.slow
def test_compiled_kernels_get_what_triton_passes(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "launches_triton.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    sources = "\n".join(path.read_text() for path in (ROOT / "atom/kernels/triton").glob("*.py"))
    assert set(done.stdout.split()) == set(re.findall(r"Launcher\((\w+_kernel)\)", sources))
