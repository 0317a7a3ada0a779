"""What is known of each request, before and after it ran."""

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True, kw_only=True)
class Prompt:
    """prompt: token ids, or text. input_len: its tokens, as far as known before a server counts them."""

    prompt: str | list[int]
    input_len: int
    output_len: int


@dataclass(slots=True)
class Record:
    """One request. Times are of time.perf_counter, in seconds.

    event_times: when each event with tokens came. Token counts are the server's own, or None without a `usage`.
    error: why it failed, in words that don't differ from request to request.
    """

    output_len: int  # asked for
    input_len: int = 0  # expected
    started: float = 0.0  # when it was sent, after any wait for --max-concurrency
    ended: float = 0.0  # when its last event with tokens came, or when it failed
    event_times: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def input_tokens(self) -> int:
        return self.input_len if self.prompt_tokens is None else self.prompt_tokens

    @property
    def output_tokens(self) -> int:
        """Without a `usage`, events are counted instead of tokens."""
        return len(self.event_times) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return self.event_times[0] - self.started if self.event_times else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds a token after the first; None for answers of one token."""
        if self.output_tokens < 2 or not self.event_times:
            return None
        return (self.event_times[-1] - self.event_times[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Seconds between events with tokens, as a reader sees them; one event may carry several tokens."""
        return [after - before for before, after in pairwise(self.event_times)]

    @property
    def e2el(self) -> float:
        """Seconds from sending to the last token."""
        return self.ended - self.started
