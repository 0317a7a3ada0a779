"""Builds the C++ kernels: once for a machine, its compiler, torch and these sources; kept in the user's cache.

`python -m atom.kernels.cpu.build` builds ahead of time and prints the library's path.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from atom.utils import envs
from atom.utils.logging import get_logger

logger = get_logger(__name__)

SOURCES = Path(__file__).parent / "csrc"
MODULE = "atom_cpu"
_COMPILERS = ("c++", "g++", "clang++")
# GCC's own intrinsics trip these two.
_WARNINGS = ("-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


class BuildError(Exception):
    """Why the kernels can't be built; one line."""


def library(march: str = "native") -> Path:
    """Path of the built extension module, building it if needed. BuildError when that can't be."""
    import torch

    compiler = _compiler()
    flags = _kernel_flags(march)
    parts = [
        *(f"{p.name}\0{p.read_text()}" for p in sorted(SOURCES.iterdir())),
        " ".join(flags),
        _output([compiler, "--version"]),
        torch.__version__,
        sys.version,
        _cpu_features() if march == "native" else "",
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = _cache_directory()
    path = folder / f"{MODULE}-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f"{path.name}.lock"):
        if not path.exists():  # another process may have built it meanwhile
            _build(compiler, flags, path)
    return path


def load(march: str = "native") -> ModuleType:
    """The extension module; importing it also registers torch.ops.atom_cpu."""
    import torch  # noqa: F401  its libraries, libgomp included, must be in the process first

    path = library(march)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(compiler: str, flags: Sequence[str], path: Path) -> None:
    import torch
    from torch.utils.cpp_extension import include_paths

    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise BuildError(f"no Python.h in {sysconfig.get_paths()['include']}: install the headers of this Python")
    logger.info("building CPU kernels, once a machine (about half a minute) ...")
    start = time.monotonic()
    libraries = Path(torch.__file__).parent / "lib"
    includes = [f"-isystem{p}" for p in (*include_paths(), sysconfig.get_paths()["include"])]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    binding_flags = ["-O1", "-g0", "-std=c++20", "-fPIC", "-fvisibility=hidden", abi, *includes]
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        # The file with torch's headers takes longest: it goes first.
        files = sorted(SOURCES.glob("*.cpp"), key=lambda p: (p.name != "bindings.cpp", -p.stat().st_size))
        objects = [f"{temporary}/{p.stem}.o" for p in files]

        def compile_one(source: Path, target: str) -> None:
            use = binding_flags if source.name == "bindings.cpp" else flags
            _run([compiler, *use, "-c", str(source), "-o", target])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile_one, files, objects))
        # torch's own OpenMP runtime, by file name: a second one would bring its own threads.
        openmp = [str(p) for p in sorted(libraries.glob("libgomp*.so*"))[:1]] or ["-fopenmp"]
        built = f"{temporary}/{path.name}"
        torch_libraries = ["-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
        rpath = f"-Wl,-rpath,{libraries}"
        _run([compiler, "-shared", *objects, "-o", built, *openmp, f"-L{libraries}", *torch_libraries, rpath])
        os.replace(built, path)
    logger.info("built CPU kernels in %.0f s: %s", time.monotonic() - start, path)


def _kernel_flags(march: str) -> list[str]:
    flags = ["-O3", "-g0", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *_WARNINGS]
    if platform.machine() in ("x86_64", "AMD64", "i686") or march != "native":
        flags.append(f"-march={march}")
    else:
        flags.append("-mcpu=native")  # what GCC and Clang call it on Arm
    return flags


def _compiler() -> str:
    wanted = envs.CXX
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler: {wanted or ', '.join(_COMPILERS)} not found; install g++")


def _cache_directory() -> Path:
    return Path(envs.XDG_CACHE_HOME or Path.home() / ".cache") / "atom" / "kernels"


def _cpu_features() -> str:
    """What -march=native depends on."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        logger.debug("%s\n%s", " ".join(command), done.stderr)
        raise BuildError(f"{Path(command[0]).name} failed: {errors[0].strip() if errors else 'no message'}")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    from atom.utils.logging import configure_logging

    configure_logging()
    try:
        print(library())
    except BuildError as error:
        raise SystemExit(f"atom.kernels.cpu.build: {error}") from None
