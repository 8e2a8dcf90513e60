"""Whose sequences the KV blocks of an attention shard hold: one router's at a time.

A router that finds another's blocks in their place starts from nothing. One whose blocks were
another's meanwhile may never have seen that (views can be skipped), and is told, once.
"""

from milliways.wire.calls import Refusal
from milliways.wire.errors import RefusalReason

# A router by its worker_id, and which life of it.
Owner = tuple[str, int]


class BlockOwnership:
    """Owns who the tenant is, and who was."""

    def __init__(self) -> None:
        self.tenant: Owner = ("", 0)
        # Routers that lost the blocks to another, by the life that lost them.
        self._ousted: dict[str, int] = {}

    def enter(self, owner: Owner) -> Refusal | None:
        """Lets a router in, which may be there already, or says why not."""
        router_id, life = owner
        if router_id == self.tenant[0] and life < self.tenant[1]:
            return Refusal(RefusalReason.STALE_INCARNATION, f"router {router_id} has a later life")
        if router_id != self.tenant[0]:
            self._ousted[self.tenant[0]] = self.tenant[1]
        self.tenant = owner
        if self._ousted.pop(router_id, None) == life:
            return Refusal(RefusalReason.UNKNOWN_BATCH, "the blocks were another's meanwhile")
        return None
