"""Hands out KV blocks to sequences: allocation, reference counts, and reuse of equal prefixes.

States of a block:

- free: its contents are undefined.
- held: `allocate` or a match gave it to one or more sequences.
- idle: no sequence holds it, but it was published, so it is kept for reuse. When free blocks run
  out, the block that has been idle longest is evicted and becomes free.

A full block is published under a digest of all tokens up to its end. Equal digests mean equal
prefixes, so a sequence may attend to a block that another sequence computed. A block that another
process computed is published by its digest alone (`hold_chain`, `publish_next`). This module knows
block ids only; the arrays are in `kv_cache`.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from milliways.model.errors import OutOfBlocksError


class BlockPool:
    """Hands out block ids 0 .. num_blocks - 1 of `block_size` positions each.

    Invariant: every block is in exactly one state: in `_free`, in `_idle`, or held, which means
    that its `_ref_counts` entry is above 0.

    Invariant: `_free` holds each id at most once. A free block has no digest.

    Invariant: `_ref_counts[i]` is the number of holds on block i. It is never negative.

    Invariant: `_digests` (block to digest) and `_published` (digest to block) are inverse to each
    other. A published block is idle or held.

    Invariant: `_parents` has the same keys as `_published`. A value is the digest of the block
    before; it is empty for the first block of a sequence. That block may have been evicted.

    Invariant: `_idle` is ordered: the block that has been idle longest comes first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks = {num_blocks}, block_size = {block_size}: both must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._digests: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}
        self._parents: dict[bytes, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """The number of blocks that `allocate` can hand out: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """The number of blocks that sequences hold."""
        return self.num_blocks - self.num_available

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether `allocate(num_blocks)` would succeed now."""
        return num_blocks <= self.num_available

    def allocate(self, num_blocks: int) -> list[int]:
        """Hands out blocks with undefined contents, one hold each; evicts idle ones if necessary.

        Raises:
            OutOfBlocksError: too few blocks are available; none was handed out.
        """
        if not self.can_allocate(num_blocks):
            raise OutOfBlocksError(num_blocks, self.num_available)
        return [self._take() for _ in range(num_blocks)]

    def free(self, block_ids: Sequence[int]) -> None:
        """Releases one hold on each block. A published block stays for reuse until evicted."""
        # The later blocks of a prefix are useless without the earlier ones: evict them first.
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._release(block_id)

    def match_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Holds the published blocks of the longest prefix of `token_ids`, and returns them.

        The last token is never part of it, since its logits must be computed.
        """
        matched = []
        num_usable = (len(token_ids) - 1) // self.block_size
        for _, digest in zip(range(num_usable), self._chain(token_ids), strict=False):
            block_id = self._published.get(digest)
            if block_id is None:
                break
            self._hold(block_id)
            matched.append(block_id)
        return matched

    def publish(self, token_ids: Sequence[int], block_ids: Sequence[int]) -> None:
        """Publishes the full blocks of a sequence; `token_ids` are its computed tokens.

        A prefix that was published before keeps the block that it was published with.
        """
        parent = b""
        for block_id, digest in zip(block_ids, self._chain(token_ids), strict=False):
            if digest not in self._published and block_id not in self._digests:
                self._publish(block_id, digest, parent)
            parent = digest

    def hold_chain(self, digest: bytes) -> list[int] | None:
        """Holds the published block of a digest and all blocks before it; returns them in order.

        Returns None and holds nothing if one of them is missing. An empty digest gives no blocks.
        """
        block_ids: list[int] = []
        while digest:
            block_id = self._published.get(digest)
            if block_id is None:
                return None
            block_ids.append(block_id)
            digest = self._parents[digest]
        block_ids.reverse()
        for block_id in block_ids:
            self._hold(block_id)
        return block_ids

    def try_hold(self, digest: bytes) -> int | None:
        """Holds the published block of a digest, and returns it; None if there is no such block."""
        block_id = self._published.get(digest)
        if block_id is not None:
            self._hold(block_id)
        return block_id

    def publish_next(self, block_id: int, digest: bytes, parent: bytes) -> None:
        """Publishes one block that the caller holds; `parent` is the digest of the block before."""
        assert self._ref_counts[block_id] > 0 and block_id not in self._digests
        assert digest not in self._published
        self._publish(block_id, digest, parent)

    def forget(self) -> None:
        """Withdraws everything that was published: the contents of the blocks are lost."""
        self._published.clear()
        self._parents.clear()
        self._digests.clear()
        self._free.extend(reversed(self._idle))
        self._idle.clear()

    def check_integrity(self) -> None:
        """Asserts the invariants of the class. No other thread may use the pool meanwhile."""
        free, idle = set(self._free), set(self._idle)
        held = {i for i, count in enumerate(self._ref_counts) if count > 0}
        assert len(free) == len(self._free) and not (free & idle or free & held or idle & held)
        assert len(free) + len(idle) + len(held) == self.num_blocks
        assert idle <= set(self._digests)
        assert {block: digest for digest, block in self._published.items()} == self._digests
        assert self._parents.keys() == self._published.keys()

    def _take(self) -> int:
        if not self._free:
            oldest, _ = self._idle.popitem(last=False)
            digest = self._digests.pop(oldest)
            del self._published[digest], self._parents[digest]
            self._free.append(oldest)
        block_id = self._free.pop()
        self._ref_counts[block_id] = 1
        return block_id

    def _hold(self, block_id: int) -> None:
        self._idle.pop(block_id, None)
        self._ref_counts[block_id] += 1

    def _publish(self, block_id: int, digest: bytes, parent: bytes) -> None:
        self._published[digest] = block_id
        self._digests[block_id] = digest
        self._parents[digest] = parent

    def _release(self, block_id: int) -> None:
        if block_id in self._digests:
            self._idle[block_id] = None
        else:
            self._free.append(block_id)

    def _chain(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        """The digest of each full block, in order. It covers all tokens up to the block's end."""
        digest = b""
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            digest = chain_digest(digest, token_ids[end - self.block_size : end])
            yield digest


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full block: it covers its tokens and, through `parent`, all before them."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
