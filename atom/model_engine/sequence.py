"""One request as the scheduler sees it: its tokens, its blocks, and how far it has been computed."""

import enum
from typing import TYPE_CHECKING

from atom.model_engine.protocol import EngineRequest

if TYPE_CHECKING:
    from atom.model_engine.structured_output import Grammar


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Mutable scheduling state; no tensors.

    num_computed_tokens counts tokens whose keys and values are in the cache, or will be by a step already
    scheduled; the sequence decodes when just its last token is left to compute, and prefills while more are.
    num_pending_tokens were sampled, or will be by such a step, but are not known here yet.
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "grammar",
        "max_num_tokens",
        "min_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "order",
        "params",
        "request",
        "request_id",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self, request: EngineRequest, order: int, max_model_len: int, grammar: "Grammar | None" = None
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.params = request.sampling_params
        self.grammar = grammar  # has taken in all known tokens of the output
        self.order = order  # of arrival: the tie-break among equal priorities
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        # Stop tokens count from the lower on; with the higher it ends.
        self.min_num_tokens = self.num_prompt_tokens + self.params.min_tokens
        self.max_num_tokens = min(self.num_prompt_tokens + self.params.max_tokens, max_model_len)
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0  # of the first prefill, as reported to the user
        self.num_preemptions = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []  # chain over full blocks of known tokens
        self.num_registered_blocks = 0  # leading blocks offered to the prefix cache
        self.stop_token_ids = frozenset(self.params.stop_token_ids)
        self.status = SequenceStatus.WAITING

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def sort_key(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return (self.request.priority, self.order)
