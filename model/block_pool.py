"""Which KV block belongs to whom: allocation, reference counts, and reuse of equal prefixes.

Life of a block: free -> held by one or more sequences (`allocate`, `match_prefix`) -> when the last
one lets go, kept for reuse if its contents were published, else free -> evicted, oldest first, when
free blocks run out.

A full block is published under a digest of all tokens up to its end, so equal digests mean equal
prefixes and a sequence may attend to another's block. One computed in another process is published
by its digest alone (`hold_chain`, `publish_next`). Nothing here touches an array.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from milliways.model.errors import OutOfBlocksError


class BlockPool:
    """Actuator out block ids 0 .. num_blocks - 1 of `block_size` positions each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks = {num_blocks}, block_size = {block_size}: both >= 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._digests: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}
        # Of each published digest, that of the block before: empty at the beginning of a sequence.
        self._parents: dict[bytes, bytes] = {}
        # Published blocks that nobody holds, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and those kept only for reuse."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks some sequence holds."""
        return self.num_blocks - self.num_available

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether `allocate(num_blocks)` would succeed now."""
        return num_blocks <= self.num_available

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks of undefined contents for one holder, evicting idle ones if need be.

        Raises:
            OutOfBlocksError: too few are available; nothing was taken.
        """
        if not self.can_allocate(num_blocks):
            raise OutOfBlocksError(num_blocks, self.num_available)
        return [self._take() for _ in range(num_blocks)]

    def free(self, block_ids: Sequence[int]) -> None:
        """Lets go of blocks, one hold each; published ones stay for reuse until evicted."""
        # Later blocks of a prefix are of no use without the earlier ones: they go first.
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is not held"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._release(block_id)

    def match_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Takes hold of the published blocks that hold the longest prefix of `token_ids`.

        At least the last token is left out, since its logits must be computed.
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
        """Offers the full blocks of a sequence for reuse; `token_ids` are those already computed.

        A prefix that is published already keeps its first block.
        """
        parent = b""
        for block_id, digest in zip(block_ids, self._chain(token_ids), strict=False):
            if digest not in self._published and block_id not in self._digests:
                self._publish(block_id, digest, parent)
            parent = digest

    def hold_chain(self, digest: bytes) -> list[int] | None:
        """Takes hold of the published block of a digest and of all before it, first to last.

        None, and no hold, where one of them is not here. Of no digest the chain is empty.
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
        """Takes hold of the published block of a digest; None where it is not here."""
        block_id = self._published.get(digest)
        if block_id is not None:
            self._hold(block_id)
        return block_id

    def publish_next(self, block_id: int, digest: bytes, parent: bytes) -> None:
        """Offers one block, held by the caller, for reuse; `parent` is the digest before it."""
        assert self._ref_counts[block_id] > 0 and block_id not in self._digests
        assert digest not in self._published
        self._publish(block_id, digest, parent)

    def forget(self) -> None:
        """Takes back all offers: the contents of the blocks are lost."""
        self._published.clear()
        self._parents.clear()
        self._digests.clear()
        self._free.extend(reversed(self._idle))
        self._idle.clear()

    def check_integrity(self) -> None:
        """Asserts that every block is in exactly one state; call it when nothing runs."""
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
        """Digest of each full block together with everything before it."""
        digest = b""
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            digest = chain_digest(digest, token_ids[end - self.block_size : end])
            yield digest


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block: of its tokens and, by the digest before it, of all before them."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
