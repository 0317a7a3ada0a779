"""Which CPUs the threads of the kernels run on."""

import os
from collections.abc import Collection
from pathlib import Path

from atom.kernels.cpu import extension
from atom.utils.errors import ConfigError

_TOPOLOGY = Path("/sys/devices/system/cpu")


def bind_threads(count: int) -> tuple[int, ...]:
    """Bind each of `count` threads, less the caller, to a CPU of its own among those the process may use.

    Returns the CPUs: the caller's, which is left to it but not bound, then those of the others. A second CPU of a
    core is only used when the cores run out. Raises ConfigError where the system can't bind or has too few CPUs.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError("ATOM_CPU_THREAD_BINDING='cores' works on Linux only; leave it unset here")
    allowed = os.sched_getaffinity(0)
    if count > len(allowed):
        raise ConfigError(
            f"ATOM_CPU_THREAD_BINDING='cores' needs a CPU a thread: num_threads={count}, but this process may use "
            f"{len(allowed)}; lower num_threads"
        )
    cpus = tuple(cores_first(allowed)[:count])
    try:
        extension().bind_threads(cpus)
    except OSError as error:
        raise ConfigError(f"ATOM_CPU_THREAD_BINDING='cores': the system refused CPUs {cpus}: {error}") from None
    return cpus


def cores_first(cpus: Collection[int], topology: Path = _TOPOLOGY) -> list[int]:
    """The CPUs in ascending order: one of each physical core, then each core's second, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for cpu in sorted(cpus):
        try:
            core = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            core = str(cpu)  # not known: a core of its own
        seen[core] = seen.get(core, 0) + 1
        ranked.append((seen[core], cpu))
    return [cpu for _, cpu in sorted(ranked)]
