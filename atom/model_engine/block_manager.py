"""Cache blocks: who holds them, and which hold a prefix that can be reused.

A block is offered for reuse once all its tokens are computed. Its key is a hash chained over the
parent block's key, its tokens and the request's cache salt, so equal keys mean equal prefixes.
Freed blocks keep their content until they are handed out again, least recently used first.
"""

from collections import OrderedDict
from collections.abc import Sequence as Seq

import numpy as np
import xxhash

from atom.model_engine.sequence import Sequence


class BlockManager:
    """Hands out block ids 0..num_blocks-1 with reference counts; touches no memory itself."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_count = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))  # next first
        self._hash_of: dict[int, bytes] = {}  # cached block -> key
        self._block_of: dict[bytes, int] = {}  # key -> cached block
        self.num_queried_tokens = 0  # of all prefix look-ups that led to an admission
        self.num_hit_tokens = 0

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """The cached blocks of the longest known prefix, always leaving a token to compute."""
        if not self.enable_prefix_caching:
            return []
        self._extend_hashes(seq)
        blocks: list[int] = []
        for key in seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_hold(self, num_tokens: int, cached_blocks: Seq[int] = ()) -> bool:
        """Whether a sequence of num_tokens that starts with cached_blocks could be held now."""
        taken_from_free = sum(1 for b in cached_blocks if self._ref_count[b] == 0)
        return self.blocks_for(num_tokens) - len(cached_blocks) + taken_from_free <= len(self._free)

    def start(self, seq: Sequence, cached_blocks: list[int]) -> None:
        """Make the prefix hit the sequence's first blocks."""
        assert not seq.block_ids
        for block in cached_blocks:
            if self._ref_count[block] == 0:
                del self._free[block]
            self._ref_count[block] += 1
        seq.block_ids = list(cached_blocks)
        seq.capacity = len(cached_blocks) * self.block_size
        self._set_registered(seq, len(cached_blocks))
        if self.enable_prefix_caching:
            self.num_queried_tokens += seq.num_tokens
            self.num_hit_tokens += len(cached_blocks) * self.block_size

    def grow(self, seq: Sequence, num_tokens: int) -> list[int] | None:
        """Append blocks until num_tokens fit; the new ids, or None (and no change) when too few are free."""
        missing = self.blocks_for(num_tokens) - len(seq.block_ids)
        if missing <= 0:
            return []
        if missing > len(self._free):
            return None
        new = [self._take() for _ in range(missing)]
        seq.block_ids += new
        seq.capacity = len(seq.block_ids) * self.block_size
        return new

    def add_block(self, seq: Sequence) -> list[int]:
        """Append one of the free blocks, of which there is one, and return its id; the caller counts its capacity."""
        new = [self._take()]
        seq.block_ids += new
        return new

    def register_computed(self, seq: Sequence) -> None:
        """Offer the sequence's full, computed blocks to the prefix cache."""
        if not self.enable_prefix_caching:
            return
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if num_full <= seq.num_registered_blocks:
            return
        self._extend_hashes(seq)
        for i in range(seq.num_registered_blocks, num_full):
            key, block = seq.block_hashes[i], seq.block_ids[i]
            # An equal block may be there already, computed by a request of the same batch: keep the first.
            if key not in self._block_of:
                self._block_of[key] = block
                self._hash_of[block] = key
        self._set_registered(seq, num_full)

    def free(self, seq: Sequence) -> None:
        """Give all blocks back. The end of a sequence is reused before its start, which others may share."""
        for block in reversed(seq.block_ids):
            self._ref_count[block] -= 1
            assert self._ref_count[block] >= 0
            if self._ref_count[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)
        seq.block_ids = []
        seq.capacity = 0
        self._set_registered(seq, 0)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False (and no change) while any block is in use."""
        if len(self._free) != self.num_blocks:
            return False
        self._hash_of.clear()
        self._block_of.clear()
        return True

    def check(self, holders: Seq[Sequence]) -> None:
        """Assert the invariants: every block is free or held, and held as often as it is listed."""
        counts = [0] * self.num_blocks
        for seq in holders:
            assert len(set(seq.block_ids)) == len(seq.block_ids)
            for block in seq.block_ids:
                counts[block] += 1
        assert counts == self._ref_count
        assert {b for b in range(self.num_blocks) if counts[b] == 0} == set(self._free)
        assert {b: k for k, b in self._block_of.items()} == self._hash_of

    def _set_registered(self, seq: Sequence, num_blocks: int) -> None:
        seq.num_registered_blocks = num_blocks
        if self.enable_prefix_caching:
            seq.registers_at = (num_blocks + 1) * self.block_size

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
        assert self._ref_count[block] == 0
        self._ref_count[block] = 1
        return block

    def _extend_hashes(self, seq: Sequence) -> None:
        size, hashes = self.block_size, seq.block_hashes
        num_full = len(seq.token_ids) // size
        if len(hashes) == num_full:
            return
        parent = hashes[-1] if hashes else xxhash.xxh3_128_digest(seq.request.cache_salt.encode())
        tokens = np.asarray(seq.token_ids[len(hashes) * size : num_full * size], dtype=np.int64)
        for row in tokens.reshape(-1, size):
            parent = xxhash.xxh3_128_digest(parent + row.tobytes())
            hashes.append(parent)
