"""Sequences that a step handles together."""

from functools import cached_property

import numpy as np

from atom.model_engine.sequence import Sequence, SequenceStatus


class SequenceGroup:
    """Sequences in order, and what is asked of all of them at once. rows: int64 [n], theirs in the table."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences[:]
        self.request_ids = [seq.request_id for seq in sequences]
        self.rows = np.array([seq.row for seq in sequences], dtype=np.int64)

    @cached_property
    def token_lists(self) -> list[list[int]]:
        """The sequences' own token_ids, found without touching each sequence."""
        return [seq.token_ids for seq in self.sequences]

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """That end at least one of them."""
        return frozenset().union(*{seq.stop_token_ids for seq in self.sequences})

    def take(self, indices: list[int]) -> "SequenceGroup":
        return SequenceGroup([self.sequences[i] for i in indices])

    def indices_of_running(self) -> list[int]:
        return [i for i, seq in enumerate(self.sequences) if seq.status is SequenceStatus.RUNNING]

    def indices_of_unfinished(self) -> list[int]:
        return [i for i, seq in enumerate(self.sequences) if seq.status is not SequenceStatus.FINISHED]
