"""Starts workers, and starts them again when they die: one task for each.

What happens to a worker:

1. `spawn` starts a process on some node, and returns its address and its memory limit.
2. It waits for a placement, which is planned as soon as all workers asked for are there.
3. `load` makes it read its shards. If a file cannot be read, or has other bytes than the model that
   is served, it tries again after a pause. Then it is READY, and all others learn of it by a new
   view.
4. When it dies (`deaths`), a new view says so at once. Others load the experts that it alone held
   (`losses`). It is started again, after a pause that grows while it keeps dying.
"""

import logging

from milliways.cluster.control.deaths import (
    loop_note,
    mark_dead,
    or_death,
    reload_delay_s,
    restart_delay_s,
    until_death,
)
from milliways.cluster.control.fleet import LoadFailedError, WorkerDiedError
from milliways.cluster.control.holdings import Holdings
from milliways.cluster.control.losses import Losses
from milliways.cluster.control.publishing import ViewPublisher
from milliways.cluster.control.state import ClusterState
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.placement import ShardPlan
from milliways.wire.view import WorkerState

logger = logging.getLogger(__name__)

# What a worker without a process waits for. `Fleet.missing_resource` gives a more exact reason.
A_NODE = "a node that has room for it"
LOADING = "its shards to be loaded"


class Supervision:
    """Owns the task of each worker."""

    def __init__(
        self,
        state: ClusterState,
        publisher: ViewPublisher,
        holdings: Holdings,
        losses: Losses,
    ) -> None:
        self._state = state
        self._publisher = publisher
        self._holdings = holdings
        self._losses = losses

    @property
    def is_complete(self) -> bool:
        """Whether every expert has a holder, and there is a router."""
        return not self._state.lost_experts() and bool(self._publisher.view.routers())

    def add(self, worker_id: str) -> None:
        """Starts a worker. Its incarnations are numbered on, even if it left and is added again."""
        incarnation = self._state.last_incarnations.get(worker_id, 0)
        self.supervise(WorkerRecord(worker_id, incarnation=incarnation))

    def supervise(self, record: WorkerRecord) -> None:
        """Keeps a worker alive from now on."""
        self._state.workers[record.worker_id] = record
        record.task = self._state.tasks.start_service(self._keep_alive(record))

    async def _keep_alive(self, record: WorkerRecord) -> None:
        while not self._state.is_closed and not record.is_leaving:
            try:
                await self._run_incarnation(record)
            except WorkerDiedError as error:
                record.last_error = str(error)
                logger.warning("%s died: %s", record.worker_id, error)
            except LoadFailedError as error:
                # It did not even come up: it needs some files before it can be asked to load.
                record.note_failed_load(error)
            if record.is_leaving or self._state.is_closed:
                break
            mark_dead(self._state, record)
            self._publisher.touch()
            self._losses.make_good()
            await self._pause(record)

    async def _run_incarnation(self, record: WorkerRecord) -> None:
        """Follows one process from its start until it dies, which raises WorkerDiedError."""
        if record.is_adopted:
            record.is_adopted = False
        else:
            await self._bring_up(record)
        record.move(WorkerState.READY)
        record.ready_at_s = self._state.tasks.clock.now_s()
        self._state.note(record, "")
        self._publisher.touch()
        self._state.tasks.start(self._holdings.trim([*self._state.workers.values()]))
        await until_death(self._state, record)

    async def _bring_up(self, record: WorkerRecord) -> None:
        """Starts a process and makes it load all its shards."""
        state, worker_id = self._state, record.worker_id
        record.begin_incarnation()
        record.started_with = state.declared.values
        state.last_incarnations[worker_id] = record.incarnation
        state.note(record, A_NODE)
        spawning = state.fleet.spawn(worker_id, record.incarnation, state.small_files)
        record.spawned = await spawning
        state.note(record, "a placement, which needs all workers")
        while worker_id not in state.targets:
            await or_death(state, record, state.placed.wait())
        state.note(record, LOADING)
        # It loads again if its target changed while it was loading. A worker that is about to leave
        # has no target any more.
        loaded: ShardPlan | None = None
        while loaded != (target := state.targets.get(worker_id, record.shards)):
            assert target is not None
            record.shards = target
            if await self._try_to_load(record, target):
                loaded = target
                record.held |= target.experts

    async def _try_to_load(self, record: WorkerRecord, target: ShardPlan) -> bool:
        """Whether a worker could load its shards; if not, this waits until it may try again."""
        try:
            await self._holdings.load(record, target)
        except LoadFailedError as error:
            record.note_failed_load(error)
            delay_s = reload_delay_s(record.num_failed_loads)
            self._state.note(record, f"its next try to load, in {delay_s:g} s")
            pause = self._state.tasks.start(self._state.tasks.sleep(delay_s))
            await or_death(self._state, record, pause)
            self._state.note(record, LOADING)
            return False
        return True

    async def _pause(self, record: WorkerRecord) -> None:
        delay_s = restart_delay_s(record, others_serve=self.is_complete)
        self._state.note(record, f"its restart in {delay_s:g} s{loop_note(record)}")
        await self._state.tasks.sleep(delay_s)
