"""Decides which workers are in the cluster, and what each holds.

Each decision has a file:

    supervision            which worker is started, and started again
    deaths                 when a worker is dead, and how long its restart waits
    losses                 which others take over what it held
    targets, planner       what each worker is to hold
    holdings               what is loaded and unloaded
    resizing               how the cluster grows and shrinks
    publishing             how everybody learns of it

No token waits for anything here. No clock, thread or Ray: `Tasks` and `Fleet` have those.
"""

import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from milliways.cluster.control.fleet import Existing, Fleet
from milliways.cluster.control.holdings import Holdings
from milliways.cluster.control.losses import Losses
from milliways.cluster.control.publishing import ViewPublisher
from milliways.cluster.control.resizing import Resizing
from milliways.cluster.control.state import ClusterState, ControllerFigures
from milliways.cluster.control.supervision import A_NODE, Supervision
from milliways.cluster.control.targets import ControllerSettings, planned
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.model.manifest import EMPTY_MANIFEST, Manifest
from milliways.runtime.tasks import Signal, Task, Tasks
from milliways.wire.errors import ClusterError, PlacementError
from milliways.wire.placement import ModelBytes
from milliways.wire.view import EMPTY_VIEW, ClusterView

logger = logging.getLogger(__name__)


class Controller:
    """Owns placement and membership. `changed` fires at every change.

    Invariant: at most one change of the cluster's size runs at a time; `_changing` is the last one.
    """

    def __init__(
        self,
        model: ModelBytes,
        settings: ControllerSettings,
        fleet: Fleet,
        tasks: Tasks,
        pinned: Manifest = EMPTY_MANIFEST,
    ) -> None:
        """`pinned` has the digests of all parts of the model, if they are known beforehand."""
        self._state = ClusterState(model, settings, fleet, tasks)
        self._state.manifest, self._state.manifest_is_whole = pinned, len(pinned) > 0
        self._tasks = tasks
        self._publisher = ViewPublisher(self._state)
        holdings = Holdings(self._state, self._publisher)
        losses = Losses(self._state, holdings)
        self._supervision = Supervision(self._state, self._publisher, holdings, losses)
        self._resizing = Resizing(self._state, self._publisher, holdings, self._supervision)
        self._changing: Task[None] | None = None

    @property
    def view(self) -> ClusterView:
        return self._publisher.view

    @property
    def workers(self) -> Mapping[str, WorkerRecord]:
        return self._state.workers

    @property
    def figures(self) -> ControllerFigures:
        return self._state.figures

    @property
    def failure(self) -> ClusterError | None:
        """Why the cluster cannot come up, if it cannot."""
        return self._state.failure

    @property
    def changed(self) -> Signal:
        return self._state.changed

    @property
    def is_complete(self) -> bool:
        """Whether every expert has a holder, and there is a router."""
        return self._supervision.is_complete

    def start(self, existing: Sequence[Existing] = (), known: ClusterView = EMPTY_VIEW) -> None:
        """Begins to bring the cluster up, or goes on with the workers that there are.

        Nothing is saved. The workers know what their controller knew, and go on serving without a
        controller. If the workers died too, the caller that wants a new controller knows at least
        the last view that it received.
        """
        self._tasks.start_service(self._publisher.serve())
        self._adopt(existing, known)
        num_wanted = len(self.view.members) or self._state.settings.num_workers
        for number in range(num_wanted):
            if f"worker-{number}" not in self.workers:
                self._supervision.add(f"worker-{number}")
        self._tasks.start_service(self._place_when_all_there())

    def overtake(self, placement_epoch: int) -> None:
        """Moves the epoch beyond one that an earlier controller published, if it was higher."""
        self._publisher.overtake(placement_epoch)

    def close(self) -> None:
        """Stops supervising: no worker that dies is started again."""
        self._state.is_closed = True
        for record in self.workers.values():
            if record.task is not None:
                record.task.cancel()

    def scale(self, num_workers: int) -> Task[None]:
        """Grows or shrinks; done when the new placement is served.

        Fails with PlacementError if the change is impossible, and with StartupError if new workers
        do not come. After a failure, the cluster is as before.
        """
        return self._change(self._resizing.scale(num_workers))

    def drain(self, worker_id: str, *, restarts: bool = False) -> Task[None]:
        """Moves a worker's experts and requests away, then stops or restarts the worker.

        Fails with PlacementError if no other worker can take the experts. A worker that has the
        only copy of attention layers may restart, and requests wait meanwhile.
        """
        return self._change(self._resizing.drain(worker_id, restarts))

    def waits_for(self, record: WorkerRecord) -> str:
        """What a worker waits for now, as a text for people; empty if it waits for nothing."""
        if record.waits_for == A_NODE:
            return self._state.fleet.missing_resource(record.worker_id)
        return record.waits_for

    def _adopt(self, existing: Sequence[Existing], known: ClusterView) -> None:
        views = [known, *(found.view for found in existing)]
        newest = max(views, key=lambda view: view.placement_epoch)
        self._publisher.go_on_from(newest)
        state = self._state
        if state.manifest.differing(newest.manifest):
            logger.warning("the pinned manifest is not that of the running model, which counts")
        state.manifest = newest.manifest.with_all(state.manifest)
        state.manifest_is_whole |= newest.manifest_is_whole
        for found in existing:
            if state.manifest.differing(found.manifest):
                # It loaded at the same time as another worker, and nobody has promised it yet. Its
                # next incarnation replaces it.
                continue
            state.manifest = state.manifest.with_all(found.manifest)
            record = WorkerRecord(found.worker_id, incarnation=found.incarnation)
            record.spawned, record.shards = found.spawned, found.shards
            record.held, record.is_adopted = found.held, True
            self._state.targets[found.worker_id] = found.shards
            self._supervision.supervise(record)
        for member in self.view.members.values():
            if member.worker_id not in self.workers:
                # It is dead. Its next incarnation must have a higher number than its last one.
                record = WorkerRecord(member.worker_id, incarnation=member.incarnation)
                self._supervision.supervise(record)
                # The known view may still promise it.
                self._publisher.touch()

    async def _place_when_all_there(self) -> None:
        state = self._state
        while any(record.spawned is None for record in self.workers.values()):
            await self.changed.wait()
        try:
            targets = planned(state.model, state.settings, list(self.workers.values()))
        except PlacementError as error:
            state.failure = error
            self.changed.notify()
            return
        # Workers that have their shards already keep them.
        state.targets = targets | state.targets
        state.placed.notify()

    def _change(self, steps: Coroutine[Any, Any, None]) -> Task[None]:
        """Starts a change of the cluster, or refuses it while another one goes on."""
        if self._changing is not None and not self._changing.is_done:
            steps.close()
            return self._tasks.start(self._refuse_change())
        self._changing = self._tasks.start(steps)
        return self._changing

    async def _refuse_change(self) -> None:
        raise PlacementError("another change of the cluster goes on; ask again when it is done")
