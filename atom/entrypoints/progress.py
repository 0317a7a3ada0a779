"""Progress of a batch of requests on a terminal's stderr."""

import sys
import time

from atom.model_engine.outputs import RequestOutput

_WIDTH = 30
_SECONDS_BETWEEN_UPDATES = 0.1


class RequestProgress:
    """Requests done, and tokens a second of prompts and answers. Draws nothing where stderr is no terminal."""

    def __init__(self, total: int, enabled: bool) -> None:
        self.enabled = enabled and sys.stderr.isatty() and total > 0
        self.total, self.done = total, 0
        self.prompt_tokens = self.output_tokens = 0
        self._started = time.perf_counter()
        self._next_update = 0.0

    def __enter__(self) -> "RequestProgress":
        self._started = time.perf_counter()
        if self.enabled:
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._draw()
            sys.stderr.write("\n")

    def advance(self, output: RequestOutput) -> None:
        """One request has finished."""
        self.done += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.output_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        now = time.perf_counter()
        if self.enabled and now >= self._next_update:
            self._next_update = now + _SECONDS_BETWEEN_UPDATES
            self._draw()

    def _draw(self) -> None:
        share = self.done / self.total
        bar = ("█" * round(share * _WIDTH)).ljust(_WIDTH, "░")
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rates = f"in {self.prompt_tokens / seconds:.0f}, out {self.output_tokens / seconds:.0f} tokens/s"
        sys.stderr.write(f"\r{bar} {self.done}/{self.total} requests, {rates}, {seconds:.1f} s\x1b[K")
        sys.stderr.flush()
