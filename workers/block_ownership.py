"""Which router owns the KV blocks of an attention shard: one router at a time.

A router that takes the blocks over from another router starts with empty blocks. A router that lost
them may not know it, because views can be skipped. When it comes back, it is refused once.
"""

from milliways.wire.calls import Refusal
from milliways.wire.errors import RefusalReason

# A router: its worker_id and its incarnation.
Owner = tuple[str, int]


class BlockOwnership:
    """Knows the present owner and the earlier ones.

    Invariant: a router is never in `_ousted` while it is the owner.
    """

    def __init__(self) -> None:
        self.owner: Owner = ("", 0)
        # Routers that lost the blocks to another one, and their incarnation when they lost them.
        self._ousted: dict[str, int] = {}

    def enter(self, owner: Owner) -> Refusal | None:
        """Makes a router the owner, which it may be already, or says why not."""
        router_id, incarnation = owner
        if router_id == self.owner[0] and incarnation < self.owner[1]:
            return Refusal(
                RefusalReason.STALE_INCARNATION, f"router {router_id} has a later incarnation"
            )
        if router_id != self.owner[0]:
            self._ousted[self.owner[0]] = self.owner[1]
        self.owner = owner
        if self._ousted.pop(router_id, None) == incarnation:
            return Refusal(RefusalReason.UNKNOWN_BATCH, "another router owned the blocks meanwhile")
        return None
