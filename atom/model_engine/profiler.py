"""Traces of what the worker does, for https://ui.perfetto.dev or chrome://tracing."""

import os
import time

import torch

from atom.utils.logging import get_logger

logger = get_logger(__name__)


class Profiler:
    """Start and stop torch's profiler; each stop writes one gzipped trace into `directory`.

    detailed: record shapes, stacks and memory as well (ATOM_PROFILER_MORE=1), at a price in speed.
    """

    def __init__(self, directory: str, detailed: bool, rank: int = 0) -> None:
        self._directory = directory
        self._detailed = detailed
        self._rank = rank
        self._profile: torch.profiler.profile | None = None

    def start(self) -> None:
        if self._profile is not None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            record_shapes=self._detailed,
            with_stack=self._detailed,
            profile_memory=self._detailed,
        )
        self._profile.start()

    def stop(self) -> str | None:
        """The path of the trace, or None when none was running."""
        if self._profile is None:
            return None
        profile, self._profile = self._profile, None
        profile.stop()
        os.makedirs(self._directory, exist_ok=True)
        name = f"atom-rank{self._rank}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json.gz"
        path = os.path.join(self._directory, name)
        profile.export_chrome_trace(path)
        logger.info("profiler trace written to %s", path)
        return path
