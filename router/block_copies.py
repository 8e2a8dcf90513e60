"""Copies of KV blocks: sends a router's own to its standby, and keeps those of other routers.

`Standby` decides what to send next; this module has the blocks read, sends them and reports what
happened. One run is read and sent at a time, between other callbacks of the router's thread: a step
never waits for an answer, at most for the reading of one run. Blocks of other routers are kept like
blocks that were computed here and freed, and evicted like them: the last ones of a sequence first.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from milliways.model.block_pool import chain_digest
from milliways.router.links.link_table import LinkTable
from milliways.router.scheduler import Scheduler
from milliways.router.standby import Run, Standby, StandbyLimits
from milliways.runtime.tasks import Pending, Tasks, Timer
from milliways.wire.calls import BlocksStored, Refusal, Result, StoreBlocks
from milliways.wire.errors import RefusalReason

KeysAndValues = tuple[np.ndarray, np.ndarray]


class BlockArrays(Protocol):
    """The keys and values of the blocks of a router's pool; used in the router's thread.

    If another thread computes steps, it also reads and writes blocks, in the order of these calls
    and of the steps: so what is read is what was there before the next step.
    """

    @property
    def first_layer(self) -> int: ...

    @property
    def block_bytes(self) -> int:
        """Bytes of the keys and values of one block, in all layers."""
        ...

    def read_blocks(self, block_ids: tuple[int, ...]) -> KeysAndValues | Pending[KeysAndValues]:
        """Keys and values [C, L, P, R, K] of blocks, copied; at once, or later."""
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
        """The reason why these blocks cannot be kept here; None if they can."""
        ...


# None until the shards are loaded: a router is made before them.
ArraysNow = Callable[[], BlockArrays | None]


class BlockCopies:
    """Owns the sending of a router's blocks, and the keeping of other routers' blocks.

    Invariant: at most one turn is scheduled (`_timer`), and none while a run is read.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        links: LinkTable,
        tasks: Tasks,
        arrays_now: ArraysNow,
        timeout_s: float,
        limits: StandbyLimits | None = None,
    ) -> None:
        """A standby that has not answered after twice `timeout_s` is given up."""
        self.standby = Standby(scheduler.pool.block_size, limits)
        # Blocks of other routers that were kept, since the start.
        self.num_kept = 0
        self._scheduler = scheduler
        self._links = links
        self._tasks = tasks
        self._arrays_now = arrays_now
        self.timeout_s = timeout_s
        self._timer: Timer | None = None
        self._is_reading = False

    @property
    def standby_id(self) -> str:
        """The router that gets the copies; empty if none does."""
        peer = self.standby.peer
        return peer[0] if peer is not None else ""

    def view_changed(self) -> None:
        """Chooses a standby; one with copies of running sequences is kept while the view allows."""
        members = self._links.view.standbys(self._links.router_id)
        peers = [(member.worker_id, member.incarnation) for member in members]
        if self.standby.peer not in peers or not self.standby.is_in_use:
            self.standby.follow(peers[0] if peers else None)
        self.look()

    def look(self) -> None:
        """Blocks may have become full: sends some of them in the next turn of the thread."""
        if self._timer is None and not self._is_reading and self.standby.peer is not None:
            self._timer = self._tasks.call_later(0.0, self._take_turn)

    def store(self, call: StoreBlocks) -> Result:
        """Keeps blocks that another router computed, as many as there is room for.

        They never replace blocks of running sequences; blocks in the prefix cache may be evicted.
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
            # The last block first, so that it is evicted before the blocks that it needs.
            pool.free(held)
        if not num_stored:
            return Refusal(RefusalReason.OVERLOADED, "no block is free")
        return BlocksStored(num_stored)

    def _store_after(self, held: list[int], arrays: BlockArrays, call: StoreBlocks) -> int:
        """Adds the blocks of a call to those that are held; returns how many were added."""
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
        """Sends one run, and schedules the next turn."""
        self._timer = None
        arrays, standby_id = self._arrays_now(), self.standby_id
        if arrays is None or not self._links.is_open(standby_id):
            return
        now_s = self._tasks.clock.now_s()
        run = self.standby.next_run(self._scheduler.running, arrays.block_bytes, now_s)
        if run is None:
            return
        read = arrays.read_blocks(run.block_ids)
        if isinstance(read, tuple):
            self._send(standby_id, run, arrays.first_layer, *read)
            return
        self._is_reading = True

        def send() -> None:
            self._is_reading = False
            self._send(standby_id, run, arrays.first_layer, *read.result())

        read.when_done(send)

    def _send(
        self,
        standby_id: str,
        run: Run,
        first_layer: int,
        keys_CLPRK: np.ndarray,
        values_CLPRK: np.ndarray,
    ) -> None:
        call = StoreBlocks(
            first_layer=first_layer,
            parent=run.parent,
            token_ids_CP=np.array(run.token_ids, np.int32).reshape(len(run.block_ids), -1),
            keys_CLPRK=keys_CLPRK,
            values_CLPRK=values_CLPRK,
        )
        pending = self._links.ask(
            standby_id, call, step=0, timeout_s=self.timeout_s, is_timed=False
        )
        pending.when_done(lambda: self._settle(run, pending))
        if not pending.is_done:
            timeout_s = self.timeout_s * self._links.slowness(standby_id)
            self._links.abandon(standby_id, pending, 2 * timeout_s)
        self.look()

    def _settle(self, run: Run, pending: Pending[Result]) -> None:
        now_s = self._tasks.clock.now_s()
        result = pending.result() if pending.error is None else None
        if isinstance(result, BlocksStored):
            self.standby.stored(run, min(result.num_blocks, len(run.digests)), now_s)
        elif isinstance(result, Refusal) and result.reason is RefusalReason.NOT_HELD:
            self.standby.found_gap(run, now_s)
        else:
            # No room, an older view, or a broken connection: temporary. The next step retries.
            self.standby.failed(run, now_s)
        self.look()
