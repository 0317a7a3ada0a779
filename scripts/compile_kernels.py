"""Do all Triton kernels compile for a GPU that isn't here? Needs no GPU; the interpreter doesn't compile anything.

    python scripts/compile_kernels.py [--target cuda:90 | hip:gfx942] [--filter NAME] [--grid small|full]
                                        [--every N] [--first N]

Each case of tests/kernels/checks_triton.py runs up to its first comparison, with launches replaced by compiling for
the target. Prints each failure and the kernels that were compiled, and exits with 1 if there was a failure.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does when unset, without its warning

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402


class AbsentGPU:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def parse_target(text: str) -> GPUTarget:
    backend, _, arch = text.partition(":")
    return GPUTarget("hip", arch, 64) if backend == "hip" else GPUTarget("cuda", int(arch), 32)


def compile_only(target: GPUTarget) -> tuple[set[str], list[str]]:
    """From now on calls of kernels compile them; returns the names of those that did, and the others' problems."""
    triton.runtime.driver.set_active(AbsentGPU(target))
    if target.backend == "hip":
        torch.version.hip = "7"  # atom.kernels.triton.launch chooses tiles by it

    from atom.kernels.triton import launch

    launch.num_multiprocessors = lambda device: 132
    if target.backend == "cuda":
        launch.overlap_options = lambda device: {"OVERLAP": True, "launch_pdl": True}
    compiled: set[str] = set()
    problems: list[str] = []
    run = triton.runtime.JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        try:
            run(self, *args, grid=grid, warmup=True, **kwargs)
            compiled.add(self.fn.__name__)
        except Exception as error:
            problems.append(f"{self.fn.__name__}: {type(error).__name__}: {' '.join(str(error).split())[-400:]}")

    triton.runtime.JITFunction.run = compile_instead
    return compiled, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=parse_target, default="cuda:90")
    parser.add_argument("--filter", default="", help="kernels with this in their name")
    parser.add_argument("--grid", choices=("small", "full"), default="small")
    parser.add_argument("--every", type=int, default=1, help="run each N-th case only")
    parser.add_argument("--first", type=int, default=0, help="beginning with this one")
    args = parser.parse_args()
    compiled, problems = compile_only(args.target)

    import checks_triton

    cases = checks_triton.small_cases() if args.grid == "small" else checks_triton.full_cases(torch.float8_e4m3fn)
    foreign = torch.float8_e4m3fnuz if args.target.backend == "cuda" else None
    cases = [case for case in cases if args.filter in case[0] and foreign not in case[2]]
    failed = 0
    for case in cases[args.first :: args.every]:
        _, check, check_args, kwargs = case
        try:
            check("cpu", *check_args, **kwargs)
        except AssertionError:
            pass  # nothing has been computed
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        for problem in problems:
            print(f"{checks_triton.case_id(case)}: {problem}", flush=True)
        failed += bool(problems)
        problems.clear()
    print(f"{args.target.backend}:{args.target.arch}: {failed} cases failed; compiled: {' '.join(sorted(compiled))}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
