"""Grows and shrinks the cluster, and drains workers, without a failed request.

At every moment each expert has a holder that everybody knows. New workers and those that stay load
first; only then do others leave.
"""

from collections.abc import Callable, Sequence

from milliways.cluster.control.deaths import reload_delay_s
from milliways.cluster.control.fleet import LoadFailedError, WorkerDiedError
from milliways.cluster.control.holdings import Holdings
from milliways.cluster.control.publishing import ViewPublisher
from milliways.cluster.control.state import ClusterState
from milliways.cluster.control.supervision import Supervision
from milliways.cluster.control.targets import (
    check_shrink,
    planned_anew,
    shared_out,
    split_workers,
)
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.errors import PlacementError, StartupError
from milliways.wire.placement import ShardPlan
from milliways.wire.view import WorkerState


class Resizing:
    """The steps of a change; the controller runs one change at a time."""

    def __init__(
        self,
        state: ClusterState,
        publisher: ViewPublisher,
        holdings: Holdings,
        supervision: Supervision,
    ) -> None:
        self._state = state
        self._tasks = state.tasks
        self._fleet = state.fleet
        self._publisher = publisher
        self._holdings = holdings
        self._supervision = supervision

    async def scale(self, num_workers: int, accepted: Callable[[], None] = lambda: None) -> None:
        """Grows or shrinks to a number of workers; calls `accepted` when that is known to be
        possible.

        Raises:
            PlacementError: the change is impossible. The cluster is as before.
            StartupError: new workers do not come. The cluster is as before.
        """
        state, workers = self._state, self._state.workers
        for record in [r for r in workers.values() if r.state is WorkerState.STOPPED]:
            del workers[record.worker_id]
        staying, leaving = split_workers(workers.values(), num_workers)
        check_shrink(state.model, workers.values(), leaving)
        new = [f"worker-{n}" for n in range(num_workers) if f"worker-{n}" not in workers]
        for worker_id in new:
            state.targets.pop(worker_id, None)
            self._supervision.add(worker_id)
        try:
            await self._wait_for_processes([*(r.worker_id for r in staying), *new])
            everybody = [*staying, *(workers[worker_id] for worker_id in new)]
            targets = planned_anew(state.model, state.settings, everybody)
        except (PlacementError, StartupError):
            self._remove_unplaced(new)
            raise
        accepted()
        state.targets, state.failure = targets, None
        state.placed.notify()
        await self._fill(staying)
        await self._tasks.gather(self._remove(record) for record in leaving)
        await self._holdings.trim(staying)

    async def spread(self) -> None:
        """Plans anew for the workers that there are; makes each hold exactly its target.

        Raises:
            PlacementError: they cannot hold the model. The cluster is as before.
        """
        state = self._state
        everybody = [r for r in state.workers.values() if r.state is not WorkerState.STOPPED]
        state.targets = planned_anew(state.model, state.settings, everybody)
        await self._fill(everybody)
        await self._holdings.trim(everybody)

    async def _fill(self, staying: Sequence[WorkerRecord]) -> None:
        """Makes workers load what their targets have beyond what they hold; waits for all."""
        state, targets = self._state, self._state.targets
        await self._tasks.gather(self._load_missing(r, targets[r.worker_id]) for r in staying)
        while any(state.workers[w].state is not WorkerState.READY for w in targets):
            await state.changed.wait()

    async def drain(self, worker_id: str, restarts: bool) -> None:
        """Moves a worker's experts and requests away, then stops or restarts the worker.

        Raises:
            PlacementError: the worker is not ready, or others cannot replace it. It is not stopped.
            LoadFailedError: others cannot load its experts. It is not stopped.
        """
        record = self._state.workers.get(worker_id)
        if record is None or record.state is not WorkerState.READY:
            raise PlacementError(f"{worker_id} is no worker that is ready")
        incarnation = record.incarnation
        await self._load_elsewhere(record, restarts)
        if record.state is WorkerState.READY:
            await self._hand_over(record)
        if restarts and (record.incarnation, record.state) != (incarnation, WorkerState.DRAINING):
            # It died meanwhile: supervision starts it again.
            return
        record.is_drained, record.is_leaving = True, not restarts
        if record.is_leaving and record.task is not None:
            record.task.cancel()
        await self._publisher.confirmed(worker_id, self._fleet.stop(worker_id))
        if record.is_leaving:
            record.held = frozenset()
            record.move(WorkerState.STOPPED)
            self._state.note(record, "nothing: it was drained")
            self._publisher.touch()

    async def _load_elsewhere(self, record: WorkerRecord, restarts: bool) -> None:
        """Makes other workers load the experts that only this worker holds."""
        state, worker_id = self._state, record.worker_id
        if not restarts:
            check_shrink(state.model, state.workers.values(), [record])
        others = state.ready(besides=record)
        if not others:
            raise PlacementError(f"{worker_id} is the last worker that is ready")
        only_here = state.only_held_by(record)
        shares = shared_out(state.model, state.settings, others, only_here)
        if only_here.difference(*shares.values()):
            raise PlacementError(f"no other worker has memory for the experts of {worker_id}")
        await self._tasks.gather(
            self._holdings.load_more(other, frozenset(share))
            for other in others
            if (share := shares[other.worker_id])
        )

    async def _wait_for_processes(self, worker_ids: Sequence[str]) -> None:
        workers, timeout_s = self._state.workers, self._state.settings.start_timeout_s
        until_s = self._tasks.clock.now_s() + timeout_s
        while missing := [w for w in worker_ids if workers[w].spawned is None]:
            left_s = until_s - self._tasks.clock.now_s()
            if left_s <= 0:
                waits = [f"{w} waits for {self._fleet.missing_resource(w)}" for w in missing]
                raise StartupError(f"not within {timeout_s:g} s: {'; '.join(waits)}")
            await self._tasks.wait_for(self._state.changed.wait(), left_s)

    def _remove_unplaced(self, new: Sequence[str]) -> None:
        """Removes the workers that were started for a placement that failed."""
        for worker_id in new:
            record = self._state.workers.pop(worker_id)
            record.is_leaving = True
            if record.task is not None:
                record.task.cancel()
            self._fleet.stop(worker_id)

    async def _load_missing(self, record: WorkerRecord, target: ShardPlan) -> None:
        """Loads what a worker's target has beyond what it holds."""
        while record.state is WorkerState.READY and (missing := target.experts - record.held):
            try:
                await self._holdings.load_more(record, missing)
            except LoadFailedError as error:
                # New workers try again too. Until all have loaded, nobody leaves.
                record.note_failed_load(error)
                delay_s = reload_delay_s(record.num_failed_loads)
                self._state.note(record, f"its next try to load, in {delay_s:g} s")
                await self._tasks.sleep(delay_s)
                self._state.note(record, "")
            except WorkerDiedError:
                # Its next incarnation loads the new target as a whole.
                return

    async def _remove(self, record: WorkerRecord) -> None:
        """Removes a worker without failing a request."""
        record.is_leaving = True
        if record.state is WorkerState.READY:
            await self._hand_over(record)
        del self._state.workers[record.worker_id]
        self._publisher.touch()
        await self._publisher.everybody_knows()
        if record.task is not None:
            record.task.cancel()
        stopped = self._fleet.stop(record.worker_id)
        await self._publisher.confirmed(record.worker_id, stopped)

    async def _hand_over(self, record: WorkerRecord) -> None:
        """Takes all work from a worker: first new requests, then those it has, then calls."""
        record.move(WorkerState.DRAINING)
        self._publisher.touch()
        await self._publisher.everybody_knows()
        drained = self._fleet.drain(record.worker_id)
        await self._publisher.confirmed(record.worker_id, drained)
        if record.state is WorkerState.DRAINING:
            record.held = frozenset()
            self._publisher.touch()
        await self._publisher.everybody_knows()
