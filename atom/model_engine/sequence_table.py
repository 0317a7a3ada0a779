"""The counters of all sequences side by side, so that a step reads and changes those of many at once."""

from typing import Any, overload

import numpy as np

NEVER = np.iinfo(np.int64).max


class SequenceTable:
    """One row a sequence. Columns, int64 [rows]; they are replaced when the table grows, so don't keep them:

    num_known: tokens whose values are here; num_tokens: pending ones included; num_computed: see Sequence;
    max_num_tokens: with which it ends; capacity: tokens that its blocks hold; registers_at: num_computed with which
    another block may be offered to the prefix cache; is_plain: 1 if a step adds one token and nothing else to it.
    """

    num_known: np.ndarray
    num_tokens: np.ndarray
    num_computed: np.ndarray
    max_num_tokens: np.ndarray
    capacity: np.ndarray
    registers_at: np.ndarray
    is_plain: np.ndarray

    _NAMES = ("num_known", "num_tokens", "num_computed", "max_num_tokens", "capacity", "registers_at", "is_plain")

    def __init__(self) -> None:
        self._columns = np.zeros((len(self._NAMES), 0), dtype=np.int64)
        self._free: list[int] = []
        self._grow()

    def take(self) -> int:
        """A row of zeros."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._columns[:, row] = 0
        return row

    def give_back(self, row: int) -> None:
        self._free.append(row)

    def _grow(self) -> None:
        old = self._columns.shape[1]
        more = max(old, 64)
        self._columns = np.concatenate([self._columns, np.zeros((len(self._NAMES), more), dtype=np.int64)], axis=1)
        for name, column in zip(self._NAMES, self._columns, strict=True):
            setattr(self, name, column)
        self._free.extend(range(old + more - 1, old - 1, -1))


class Counter:
    """A sequence's own value in the column of that name."""

    def __init__(self, column: str) -> None:
        self._column = column

    @overload
    def __get__(self, seq: None, owner: Any) -> "Counter": ...
    @overload
    def __get__(self, seq: Any, owner: Any) -> int: ...
    def __get__(self, seq: Any, owner: Any) -> "int | Counter":
        return self if seq is None else int(getattr(seq.table, self._column)[seq.row])

    def __set__(self, seq: Any, value: int) -> None:
        getattr(seq.table, self._column)[seq.row] = value
