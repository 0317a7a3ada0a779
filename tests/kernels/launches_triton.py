"""For test_triton_launcher.py: what `Launcher` passes to compiled kernels, beside what Triton passes. Needs no GPU.

Runs some cases of checks_triton.py, whose kernels are compiled for a GPU that isn't here. Each launch is made
by Triton and by the Launcher, and recorded where compiled kernels are called. Prints the kernels whose launches were
the same, or raises DifferentError.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import torch
import triton
from compile_kernels import AbsentGPU, GPUTarget

STREAM = 4321
calls: list[tuple[Any, ...]] = []


class Recorder:
    """In the place of Triton's own caller of compiled kernels."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        calls.append(args)


class Utilities:
    """A GPU that takes any kernel; each gets a handle of its own."""

    loaded = 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, *args: Any) -> tuple[object, int, int, int, int]:
        self.loaded += 1
        return object(), self.loaded, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class RecordingGPU(AbsentGPU):
    launcher_cls = Recorder
    utils = Utilities()

    def get_current_stream(self, device: int) -> int:
        return STREAM


triton.runtime.driver.set_active(RecordingGPU(GPUTarget("cuda", 90, 32)))

from atom.kernels.triton import launch, launcher  # noqa: E402

launch.num_multiprocessors = lambda device: 132
launch.overlap_options = lambda device: {"OVERLAP": True, "launch_pdl": True}
launcher._IS_KNOWN = True
launcher._current_device = lambda: 0
launcher._current_stream = lambda device: STREAM
launch_directly = launcher.Launcher.__call__
launched: set[str] = set()


class DifferentError(Exception):
    """No AssertionError, which checks of results raise here, as nothing is computed."""


def address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def require(same: bool, *what: Any) -> None:
    if not same:
        raise DifferentError(*what)


def launch_both_ways(self: Any, grid: Any, pointers: Any, numbers: Any, constants: Any, **options: Any) -> None:
    compiled = self.kernel[grid](*pointers, *numbers, *constants, **options)
    launch_directly(self, grid, pointers, numbers, constants, **options)  # by Triton, if this key is new
    del calls[1:]
    triton_run = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = None  # not to be asked again
    try:
        launch_directly(self, grid, pointers, numbers, constants, **options)
    finally:
        triton.runtime.JITFunction.run = triton_run
    theirs, ours = calls
    calls.clear()
    names = self.kernel.arg_names
    require(theirs[:6] == ours[:6] == (*grid, STREAM, compiled.function, compiled.packed_metadata), theirs, ours)
    require(ours[6:9] == (None, None, None), "launch metadata and hooks, which nobody set", ours)
    require(len(theirs) == len(ours) == 9 + len(names), theirs, ours)
    for name, their, our in zip(names, map(address, theirs[9:]), ours[9:], strict=True):
        require(their == our and type(their) is type(our), self.kernel.fn.__name__, name, their, our)
    launched.add(self.kernel.fn.__name__)


def main() -> None:
    launcher.Launcher.__call__ = launch_both_ways

    import checks_triton

    for name, check, args, kwargs in checks_triton.small_cases():
        if name not in ("greedy", "sample", "fused_experts") and checks_triton.FNUZ not in args:
            with contextlib.suppress(AssertionError):
                check("cpu", *args, **kwargs)
    print(*sorted(launched))


if __name__ == "__main__":
    main()
