"""Threads of the CPU kernels bound to cores, each case in a process of its own: a binding lasts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atom.kernels.cpu.threads import cores_first

ALLOWED = sorted(os.sched_getaffinity(0))
needs_two_cpus = pytest.mark.skipif(len(ALLOWED) < 2, reason="one CPU: there is nothing to bind")

PRELUDE = """
import os, torch
from atom.kernels.cpu.ops import fast
from atom.kernels.cpu.threads import bind_threads

def tasks():
    return {int(t) for t in os.listdir("/proc/self/task")}

torch.set_num_threads(1)
x, weight = torch.ones(4096, 64), torch.ones(64)

def work(threads):
    torch.set_num_threads(threads)  # torch makes no threads for this: only the kernels do
    fast.rms_norm(x, weight, 1e-5)

def masks(threads):
    return sorted(sorted(os.sched_getaffinity(t)) for t in threads)
"""


def run(code: str, cpus: list[int] = ALLOWED, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        capture_output=True,
        text=True,
        check=False,
    )


@needs_two_cpus
def test_threads_made_before_and_after_are_bound_and_the_caller_is_not():
    done = run("""
before = tasks()
work(2)                                       # makes one thread, not bound
assert masks(tasks() - before) == [sorted(os.sched_getaffinity(0))]
cpus = bind_threads(2)
assert masks(tasks() - before) == [[cpus[1]]]
assert len(os.sched_getaffinity(os.getpid())) > 1
work(3)                                       # one more than are bound
assert sorted(map(len, masks(tasks() - before))) == [1, len(os.sched_getaffinity(0))]
pid = os.fork()
if pid == 0:                                  # a forked process makes its own threads
    before = tasks()
    work(2)
    os._exit(0 if masks(tasks() - before) == [[cpus[1]]] else 1)
assert os.waitpid(pid, 0)[1] == 0
print(cpus)
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tuple(cores_first(ALLOWED)[:2]))


@needs_two_cpus
def test_only_cpus_of_the_process_are_used():
    done = run("print(bind_threads(1))", cpus=ALLOWED[-1:])
    assert done.stdout.strip() == f"({ALLOWED[-1]},)", done.stderr
    done = run("bind_threads(2)", cpus=ALLOWED[-1:])
    assert done.stderr.splitlines()[-1].endswith("num_threads=2, but this process may use 1; lower num_threads")


def test_a_physical_core_is_used_once_before_any_is_used_twice(tmp_path: Path):
    for cpu, siblings in {0: "0-1", 1: "0-1", 2: "2,6", 3: "3,7", 6: "2,6", 7: "3,7"}.items():
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert cores_first({7, 6, 3, 2, 1, 0}, tmp_path) == [0, 2, 3, 1, 6, 7]
    assert cores_first({1, 6, 3}, tmp_path) == [1, 3, 6]
    assert cores_first({8, 9}, tmp_path) == [8, 9]  # nothing is known of these
