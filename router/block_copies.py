"""Copies of KV blocks: sends a router's own to its buddy, and takes in those of others.

What is sent next says `Standby`; this reads the blocks, asks, and tells it what came back. It has
its turn between two others of the router's thread, one call a turn: a step waits for no copy, and
only for the reading of one. What comes from others is kept as if it had been computed here and let
go, and evicted like that: the copies of a sequence from its end on.
"""

from collections.abc import Callable
from collections.abc import Sequence as Row
from typing import Protocol

import numpy as np

from milliways.model.block_pool import chain_digest
from milliways.router.links.link_table import LinkTable
from milliways.router.scheduler import Scheduler
from milliways.router.standby import Run, Standby, StandbyLimits
from milliways.runtime.tasks import Pending, Tasks, Timer
from milliways.wire.calls import BlocksStored, Refusal, Result, StoreBlocks
from milliways.wire.errors import RefusalReason


class BlockArrays(Protocol):
    """The keys and values behind the block ids of a router's pool; used in its thread only."""

    @property
    def first_layer(self) -> int: ...

    @property
    def block_bytes(self) -> int:
        """Of the keys and values of one block, in all layers."""
        ...

    def read_blocks(self, block_ids: Row[int]) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [C, L, P, R, K] of blocks, copied."""
        ...

    def write_block(
        self,
        block_id: int,
        token_ids_P: np.ndarray,
        keys_LPRK: np.ndarray,
        values_LPRK: np.ndarray,
    ) -> None:
        """Puts keys and values into a block, as if its tokens had been computed there."""
        ...

    def blocks_fault(self, call: StoreBlocks) -> Refusal | None:
        """Why blocks cannot lie here, if they cannot."""
        ...


# None where there are none yet: shards are loaded later than routers are made.
ArraysNow = Callable[[], BlockArrays | None]


class BlockCopies:
    """Owns the way of copies from and to a router."""

    def __init__(
        self,
        scheduler: Scheduler,
        links: LinkTable,
        tasks: Tasks,
        arrays_now: ArraysNow,
        timeout_s: float,
        limits: StandbyLimits | None = None,
    ) -> None:
        """A buddy that has not answered within `timeout_s`, and as long again, is given up."""
        self.standby = Standby(scheduler.pool.block_size, limits)
        # Blocks of others that were taken in, since the start.
        self.num_kept = 0
        self._scheduler = scheduler
        self._links = links
        self._tasks = tasks
        self._arrays_now = arrays_now
        self._timeout_s = timeout_s
        self._timer: Timer | None = None

    @property
    def buddy_id(self) -> str:
        """Who is sent copies; empty where nobody is."""
        buddy = self.standby.buddy
        return buddy[0] if buddy is not None else ""

    def view_changed(self) -> None:
        """Chooses a buddy; one that has copies of what runs stays it as long as it can be."""
        buddies = self._links.view.buddies(self._links.router_id)
        lives = [(member.worker_id, member.incarnation) for member in buddies]
        if self.standby.buddy not in lives or not self.standby.is_in_use:
            self.standby.follow(lives[0] if lives else None)
        self.look()

    def look(self) -> None:
        """Blocks may have become full: sends what may be sent, when it is this one's turn."""
        if self._timer is None and self.standby.buddy is not None:
            self._timer = self._tasks.call_later(0.0, self._take_turn)

    def store(self, call: StoreBlocks) -> Result:
        """Takes in blocks that another router computed, as many as there is room for.

        Running sequences lose nothing by it; blocks that are kept for equal prefixes only may.
        """
        arrays = self._arrays_now()
        if arrays is None:
            return Refusal(RefusalReason.NOT_HELD, "no attention shard is here")
        fault = arrays.blocks_fault(call)
        if fault is not None:
            return fault
        pool = self._scheduler.pool
        held = pool.hold_chain(call.parent)
        if held is None:
            return Refusal(RefusalReason.NOT_HELD, "the blocks before are not here")
        try:
            num_stored = self._store_after(held, arrays, call)
        finally:
            # The last ones first, so that they are evicted before those without which they are of
            # no use.
            pool.free(held)
        if not num_stored:
            return Refusal(RefusalReason.OVERLOADED, "no block is free")
        return BlocksStored(num_stored)

    def _store_after(self, held: list[int], arrays: BlockArrays, call: StoreBlocks) -> int:
        """Adds the blocks of a call to those that are held; how many of them are here then."""
        pool, parent, num_stored = self._scheduler.pool, call.parent, 0
        rows = zip(call.token_ids_CP, call.keys_CLPRK, call.values_CLPRK, strict=True)
        for token_ids_P, keys_LPRK, values_LPRK in rows:
            digest = chain_digest(parent, token_ids_P.tolist())
            block_id = pool.try_hold(digest)
            if block_id is not None:
                held.append(block_id)
            elif not pool.can_allocate(1):
                break
            else:
                held += pool.allocate(1)
                arrays.write_block(held[-1], token_ids_P, keys_LPRK, values_LPRK)
                pool.publish_next(held[-1], digest, parent)
                self.num_kept += 1
            parent = digest
            num_stored += 1
        return num_stored

    def _take_turn(self) -> None:
        """Sends one run, and comes back for the next."""
        self._timer = None
        arrays, buddy_id = self._arrays_now(), self.buddy_id
        if arrays is None or not self._links.is_open(buddy_id):
            return
        now_s = self._tasks.clock.now_s()
        run = self.standby.next_run(self._scheduler.running, arrays.block_bytes, now_s)
        if run is None:
            return
        keys_CLPRK, values_CLPRK = arrays.read_blocks(run.block_ids)
        call = StoreBlocks(
            first_layer=arrays.first_layer,
            parent=run.parent,
            token_ids_CP=np.array(run.token_ids, np.int32).reshape(len(run.block_ids), -1),
            keys_CLPRK=keys_CLPRK,
            values_CLPRK=values_CLPRK,
        )
        pending = self._links.ask(buddy_id, call, step=0, timeout_s=self._timeout_s, is_timed=False)
        pending.when_done(lambda: self._settle(run, pending))
        if not pending.is_done:
            timeout_s = self._timeout_s * self._links.slowness(buddy_id)
            self._links.abandon(buddy_id, pending, 2 * timeout_s)
        self.look()

    def _settle(self, run: Run, pending: Pending[Result]) -> None:
        now_s = self._tasks.clock.now_s()
        result = pending.result() if pending.error is None else None
        if isinstance(result, BlocksStored):
            self.standby.stored(run, min(result.num_blocks, len(run.digests)), now_s)
        elif isinstance(result, Refusal) and result.reason is RefusalReason.NOT_HELD:
            self.standby.found_gap(run, now_s)
        else:
            # No room, an older view, or the way broke: all of it passes, and the next step looks.
            self.standby.failed(run, now_s)
        self.look()
