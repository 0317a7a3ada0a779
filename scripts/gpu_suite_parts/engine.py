"""tests/gpu's engine cases on every tiny family, in several processes that share the GPU."""

import functools
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_suite_parts.pool import run_tasks
from gpu_suite_parts.report import ROOT, Report, Settings

sys.path.append(str(ROOT / "tests" / "gpu"))


# Not engine_cases: it asks for a GPU, and processes may not be forked after that.
_PRELOAD = ["transformers", "torch._dynamo", "atom.model_engine.engine_core", "atom.model_engine.model_runner"]
TINY = ["float32 eager", "float32 preempt", "fp8-cache eager", "fused float32 eager", "waits, greedy", "token masks"]


def _make(task: tuple[str, str]) -> None:
    """Writes a family's checkpoint, and beside it what is expected of it."""
    from engine_cases import make_family

    name, folder = task
    family = make_family(name, Path(folder, name))
    Path(folder, f"{name}.pickle").write_bytes(pickle.dumps(family))


@functools.cache
def _family(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _run(task: tuple[str, str, str]) -> str:
    """ "" or why the case can't be run here."""
    from engine_cases import CASES

    name, case, folder = task
    with tempfile.TemporaryDirectory() as cache:
        try:
            CASES[case](_family(Path(folder, f"{name}.pickle")), Path(cache))
        except NotImplementedError as error:
            return str(error)
    return ""


def run(settings: Settings, report: Report) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are enough
    from engine_cases import CASES, FAMILIES, compiles

    families = ["llama"] if settings.tiny else list(FAMILIES)
    # The quick ones first: should the time not do, most has been run.
    cases = TINY if settings.tiny else sorted(CASES, key=compiles)
    report.plan([f"{family}: {case}" for family in families for case in cases])
    with tempfile.TemporaryDirectory() as folder:
        for (name, _), outcome in run_tasks(_make, [(n, folder) for n in families], settings.workers, preload=_PRELOAD):
            if outcome.problem:
                report.case(f"{name}: checkpoint", "failed", outcome.problem)
                for case in cases:
                    report.case(f"{name}: {case}", "not run", "no checkpoint", quiet=True)
        made = [name for name in families if Path(folder, f"{name}.pickle").is_file()]
        tasks = [(name, case, folder) for case in cases for name in made]
        for (name, case, _), outcome in run_tasks(_run, tasks, settings.workers, settings.deadline - 3, _PRELOAD):
            if outcome.problem:
                report.case(f"{name}: {case}", "failed", outcome.problem)
            elif outcome.finished:
                # A case that passed here may be named again as one that broke its process: see run_tasks.
                report.case(f"{name}: {case}", "not run" if outcome.value else "ok", outcome.value, quiet=True)
    for name in families:
        mine = [case for key, case in report.data["cases"].items() if key.startswith(f"{name}: ")]
        print(f"{name}: {sum(case['status'] == 'ok' for case in mine)} of {len(cases)} cases ok", flush=True)
