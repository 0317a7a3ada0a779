"""Which ranks this process belongs to.

Only tensor parallelism over one rank runs today; layers take their group as an argument, so that
sharding is written and tested before collectives exist.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TPGroup:
    """A tensor-parallel group as one of its ranks sees it."""

    rank: int = 0
    size: int = 1


_tp_group = TPGroup()


def get_tp_group() -> TPGroup:
    return _tp_group
