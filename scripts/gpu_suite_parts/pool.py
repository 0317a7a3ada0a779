"""Runs tasks in several processes that share the GPU, up to a deadline."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from gpu_suite_parts.report import ROOT

# After one of these, nothing works in the process any more.
_FATAL = ("CUDA error", "an illegal memory access", "device-side assert", "unspecified launch failure")
_broken = ""  # in a worker: the error after which that was so


@dataclass
class Outcome:
    """problem: "" where the task returned its value; finished: False where the time was up before it ran."""

    value: Any = None
    problem: str = ""
    finished: bool = True


def describe(error: BaseException) -> str:
    """The error in one line, with the last place in this repository that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
    where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:300]}"


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int,
    deadline: float = float("inf"),
    preload: Sequence[str] = (),
) -> Iterator[tuple[Any, Outcome]]:
    """(task, outcome) as they end. A task whose process died, or had been broken before, is run once more, alone.

    preload: modules that tasks need and that ask for no GPU when imported.
    """
    again: list[tuple[Any, str]] = []
    waiting: set[int] = set(range(len(tasks)))
    pool = _pool(workers, preload)
    futures = {pool.submit(_call, function, task): i for i, task in enumerate(tasks)}
    try:
        for future in as_completed(futures, timeout=_left(deadline)):
            index = futures[future]
            waiting.discard(index)
            try:
                outcome = future.result()
            except BrokenProcessPool:
                outcome = Outcome(problem="its process died")
            if outcome.problem == "its process died" or any(text in outcome.problem for text in _FATAL):
                again.append((tasks[index], outcome.problem))
            else:
                yield tasks[index], outcome
    except TimeoutError:
        pass
    _end(pool)
    for index in sorted(waiting):
        yield tasks[index], Outcome(finished=False)
    with ThreadPoolExecutor(max(1, workers)) as threads:
        reruns = {threads.submit(_alone, function, task, deadline, preload): task for task, _ in again}
        for rerun in as_completed(reruns):
            yield reruns[rerun], rerun.result()
    # What passes alone may have met another's error, but somebody has to be the cause.
    if again and not any(rerun.result().problem for rerun in reruns):
        yield again[0][0], Outcome(problem=f"it or another in its process failed, and none did alone: {again[0][1]}")


def _call(function: Callable[[Any], Any], task: Any) -> Outcome:
    global _broken
    if _broken:
        time.sleep(5)  # leaves the tasks to processes that still work
        return Outcome(problem=_broken)
    try:
        return Outcome(function(task))
    except Exception as error:
        problem = describe(error)
        _broken = problem if any(text in problem for text in _FATAL) else ""
        return Outcome(problem=problem)


def _alone(function: Callable[[Any], Any], task: Any, deadline: float, preload: Sequence[str]) -> Outcome:
    pool = _pool(1, preload)
    try:
        return pool.submit(_call, function, task).result(timeout=_left(deadline))
    except BrokenProcessPool:
        return Outcome(problem="its process died")
    except TimeoutError:
        return Outcome(finished=False)
    finally:
        _end(pool)


def _pool(workers: int, preload: Sequence[str]) -> ProcessPoolExecutor:
    """Processes that begin with the slow imports done, in a server that has never touched the GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", *preload])
    return ProcessPoolExecutor(max(1, workers), mp_context=context)


def _end(pool: ProcessPoolExecutor) -> None:
    """Without waiting for tasks that still run."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


def _left(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
