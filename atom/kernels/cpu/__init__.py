"""C++ kernels for CPUs, built once a machine with the system's compiler."""

from functools import cache
from types import ModuleType


@cache
def unavailable_reason() -> str | None:
    """One line on why these kernels can't run here, or None. The first call may build them."""
    from atom.kernels.cpu.build import BuildError

    try:
        extension()
    except (BuildError, OSError, ImportError) as error:
        return str(error).splitlines()[0]
    return None


@cache
def extension() -> ModuleType:
    """The compiled module: plain C functions, NotImplemented when they don't support the arguments."""
    from atom.kernels.cpu.build import load
    from atom.utils import startup

    with startup.phase("CPU kernels"):
        return load()
