"""One request as the scheduler sees it: its tokens, its blocks, and how far it has been computed."""

import enum
from typing import TYPE_CHECKING

from atom.model_engine.protocol import EngineRequest
from atom.model_engine.sequence_table import NEVER, Counter, SequenceTable

if TYPE_CHECKING:
    from atom.model_engine.structured_output import Grammar


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Mutable scheduling state; no tensors. Its counters are a row of the table, which steps change in bulk.

    num_computed_tokens counts tokens whose keys and values are in the cache, or will be by a step already
    scheduled; the sequence decodes when just its last token is left to compute, and prefills while more are.
    num_tokens counts pending ones, too: they were sampled, or will be by such a step, but are not known here yet.
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "grammar",
        "min_num_tokens",
        "num_cached_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "order",
        "params",
        "request",
        "request_id",
        "row",
        "status",
        "stop_token_ids",
        "table",
        "token_ids",
    )
    num_known_tokens = Counter("num_known")
    num_tokens = Counter("num_tokens")
    num_computed_tokens = Counter("num_computed")
    max_num_tokens = Counter("max_num_tokens")
    capacity = Counter("capacity")
    registers_at = Counter("registers_at")
    is_plain = Counter("is_plain")

    def __init__(
        self,
        request: EngineRequest,
        order: int,
        max_model_len: int,
        table: SequenceTable,
        grammar: "Grammar | None" = None,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.params = request.sampling_params
        self.grammar = grammar  # has taken in all known tokens of the output
        self.order = order  # of arrival: the tie-break among equal priorities
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.table = table
        self.row = table.take()
        self.num_known_tokens = self.num_tokens = self.num_prompt_tokens
        # Stop tokens count from the lower on; with the higher it ends.
        self.min_num_tokens = self.num_prompt_tokens + self.params.min_tokens
        self.max_num_tokens = min(self.num_prompt_tokens + self.params.max_tokens, max_model_len)
        self.num_cached_tokens = 0  # of the first prefill, as reported to the user
        self.num_preemptions = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []  # chain over full blocks of known tokens
        self.num_registered_blocks = 0  # leading blocks offered to the prefix cache
        self.registers_at = NEVER
        self.stop_token_ids = frozenset(self.params.stop_token_ids)
        self.status = SequenceStatus.WAITING

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def sort_key(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return (self.request.priority, self.order)

    def append(self, token: int) -> None:
        """A pending token is known now."""
        self.token_ids.append(token)
        self.num_known_tokens += 1

    def ending(self, token: int) -> tuple[str, int | None] | None:
        """(finish reason, stop token) if `token`, the last of the known ones, ends the sequence."""
        num_known = len(self.token_ids)
        if token in self.stop_token_ids and num_known >= self.min_num_tokens:
            return "stop", token
        return ("length", None) if num_known >= self.max_num_tokens else None
