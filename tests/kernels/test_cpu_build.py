"""Building the C++ kernels: the cache, missing compilers, one OpenMP runtime, and variants for other machines."""

import subprocess
import sys
from pathlib import Path

import pytest

from atom.kernels import cpu
from atom.kernels.cpu import build

HERE = Path(__file__).parent


def test_a_missing_compiler_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"^no C\+\+ compiler: no-such-compiler not found; install g\+\+$"):
        build.library()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"^no C\+\+ compiler: c\+\+, g\+\+, clang\+\+ not found"):
        build.library()


def test_a_compiler_that_fails_is_one_clear_line_and_leaves_nothing(monkeypatch, tmp_path):
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no good' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=r"^broken\+\+ failed: x.cpp:1: error: no good$"):
        build.library()
    assert [p.suffix for p in (tmp_path / "cache/atom/kernels").iterdir()] == [".lock"]


def test_without_kernels_the_references_are_used():
    code = "from atom.kernels import get_op; print(get_op('rms_norm', ('cpu', 'torch')).__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"CXX": "no-such-compiler", "PATH": "/usr/bin"},
    )
    assert done.stdout.strip() == "atom.kernels.torch.norm", done.stderr
    assert "no C++ compiler" in done.stderr


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="the kernels can't be built here")
def test_one_openmp_runtime():
    # In a process of its own: other libraries (sentencepiece) bring theirs.
    code = "import atom.kernels.cpu.ops; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = {Path(line.split()[-1]).name for line in maps.splitlines() if ".so" in line}
    runtimes = [n for n in names if n.startswith(("libgomp", "libomp", "libiomp"))]
    assert len(runtimes) == 1, runtimes


@pytest.mark.slow
@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="the kernels can't be built here")
@pytest.mark.parametrize(("march", "isa"), [("x86-64-v3", "avx2"), ("x86-64-v4", "avx512"), ("x86-64", "generic")])
def test_variants_for_other_machines(march, isa):
    flags = Path("/proc/cpuinfo").read_text()
    if {"avx2": "avx2", "avx512": "avx512vl", "generic": "sse2"}[isa] not in flags:
        pytest.skip(f"this machine can't run {march}")
    # In a process of its own, as a process can load one variant only.
    code = (
        "import sys, pytest; from atom.kernels import cpu; from atom.kernels.cpu import build\n"
        f"module = build.load({march!r}); assert module.isa() == {isa!r}; cpu.extension = lambda: module\n"
        "sys.exit(pytest.main(['-q', '-x', *sys.argv[1:]]))"
    )
    files = [str(HERE / f"test_cpu_{name}.py") for name in ("linear", "elementwise", "attention")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
