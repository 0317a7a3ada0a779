"""Launching a kernel that has run before, without Triton's search for it."""

from typing import Any

import torch
import triton
from torch.compiler import is_compiling

from atom.kernels.triton.launch import CHIP

# torch.cuda.current_device and current_stream without their Python; None in a torch built for CPUs.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
# Where the order of a compiled kernel's arguments is known. Elsewhere Triton launches, as it does on AMD GPUs, where
# it also tells tensors under 2 GiB from larger ones.
_IS_KNOWN = (
    CHIP == "hopper" and _current_stream is not None and triton.__version__.split(".")[:2] in (["3", "6"], ["3", "9"])
)
_knobs = triton.knobs.runtime


class Launcher:
    """A kernel whose launches cost the host a few microseconds instead of tens.

    `kernel[grid](...)` binds its arguments, asks for each one's type and alignment, prints all of them into a key and
    calls empty hooks, at each launch. A step of a small model launches hundreds. A Launcher lets Triton do so once for
    each key of its own, which holds all that Triton would compile differently for, and then calls the compiled kernel.

    The kernel's parameters must be pointers, then numbers, then constants. Tensors must be the current GPU's, of which
    Triton assures itself at the first launch only.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[torch.Tensor | None, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """As `kernel[grid](*pointers, *numbers, *constants, **options)`.

        options: Triton's own, and constants by name, which must be the kernel's last; always in the same order.
        """
        if is_compiling() or not _IS_KNOWN or _is_observed(self.kernel):
            self.kernel[grid](*pointers, *numbers, *constants, **options)
            return
        device = _current_device()  # type: ignore[misc]
        key, addresses = launch_key(device, pointers, numbers, constants, options)
        compiled = self._compiled.get(key)
        if compiled is None:
            kernel = self.kernel[grid](*pointers, *numbers, *constants, **options)
            if kernel is not None:  # None: a hook didn't let it be compiled
                last = [options[name] for name in self.kernel.arg_names if name in options]
                self._compiled[key] = (kernel.run, kernel.function, kernel.packed_metadata, (*constants, *last))
            return
        run, function, metadata, constants = compiled
        # No launch metadata and no hooks.
        run(*grid, _current_stream(device), function, metadata, None, None, None, *addresses, *numbers, *constants)  # type: ignore[misc]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv, for kernels too, takes microseconds to do so here."""
    return -(-a // b)


def launch_key(
    device: int,
    pointers: tuple[torch.Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[tuple[Any, ...], list[int | None]]:
    """(a key, the pointers' addresses): launches with equal keys run the same compiled kernel.

    Triton compiles for each pointer's type and whether 16 divides it, whether an integer is 1, divisible by 16 and
    32 bits wide, each constant and option. Keys may differ where Triton's don't: not all integers are specialized on.
    """
    key: list[Any] = [device, constants, *options, *options.values()]
    add = key.append
    addresses: list[int | None] = []
    for pointer in pointers:
        if pointer is None:
            add(None)
            addresses.append(None)
        else:
            address = pointer.data_ptr()
            add(pointer.dtype)
            add(address & 15 == 0)
            addresses.append(address)
    for number in numbers:
        if type(number) is not int:
            add(type(number))
        elif -0x80000000 <= number <= 0x7FFFFFFF:
            add(2 if number == 1 else number & 15 == 0)
        else:
            add(number)
    return tuple(key), addresses


def _is_observed(kernel: Any) -> bool:
    """Whether somebody, such as a profiler, wants to be told of launches."""
    enter, leave = _knobs.launch_enter_hook, _knobs.launch_exit_hook  # chains of hooks, hooks or None
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks)
