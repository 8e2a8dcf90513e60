"""Decides which workers are in the cluster, and what each holds.

Each decision has a file:

    supervision            which worker is started, and started again
    deaths                 when a worker is dead, and how long its restart waits
    losses                 which others take over what it held
    targets, planner       what each worker is to hold
    holdings               what is loaded and unloaded
    resizing               how the cluster grows and shrinks
    changes, reconciling   what is done to have the settings that are declared
    room, generations      other workers beside these: whether they fit, and which of them serve
    publishing             how everybody learns of it

No token waits for anything here. No clock, thread or Ray: `Tasks` and `Fleet` have those.
"""

import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from milliways.cluster.control.changes import Effect, anew, differences, refusal
from milliways.cluster.control.fleet import Existing, Fleet
from milliways.cluster.control.generations import hopeless
from milliways.cluster.control.holdings import Holdings
from milliways.cluster.control.losses import Losses
from milliways.cluster.control.publishing import ViewPublisher
from milliways.cluster.control.reconciling import Reconciler, by_worker, pending, running
from milliways.cluster.control.resizing import Resizing
from milliways.cluster.control.state import ClusterState, ControllerFigures
from milliways.cluster.control.supervision import A_NODE, Supervision
from milliways.cluster.control.targets import (
    ControllerSettings,
    misfit,
    misplaced,
    planned,
    used_bytes,
    with_declared,
)
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.model.manifest import EMPTY_MANIFEST, Manifest
from milliways.model.small_files import SmallFiles
from milliways.runtime.tasks import Signal, Task, Tasks
from milliways.wire.errors import ClusterError, PlacementError
from milliways.wire.placement import ModelBytes
from milliways.wire.view import EMPTY_VIEW, ClusterView, Declared, WorkerState

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
        generation: int = 1,
    ) -> None:
        """`pinned` has the digests of all parts of the model, if they are known beforehand."""
        self._state = ClusterState(model, settings, fleet, tasks, generation)
        self._state.manifest, self._state.manifest_is_whole = pinned, len(pinned) > 0
        self._tasks = tasks
        self._publisher = ViewPublisher(self._state)
        holdings = Holdings(self._state, self._publisher)
        losses = Losses(self._state, holdings)
        self._supervision = Supervision(self._state, self._publisher, holdings, losses)
        self._resizing = Resizing(self._state, self._publisher, holdings, self._supervision)
        self._changing: Task[None] | None = None
        self.reconciler = Reconciler(self._state, self._resizing, self._change)

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
    def small_files(self) -> SmallFiles | None:
        """The files beside the tensors, as a worker has read them; None before one has."""
        return self._state.small_files

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

    @property
    def all_ready(self) -> bool:
        """Whether the cluster is complete, and every worker is ready."""
        ready = (record.state is WorkerState.READY for record in self.workers.values())
        return self.is_complete and all(ready)

    def start(self, existing: Sequence[Existing] = (), known: ClusterView = EMPTY_VIEW) -> None:
        """Begins to bring the cluster up, or goes on with the workers that there are.

        Nothing is saved. The workers know what their controller knew, and go on serving without a
        controller. If the workers died too, the caller that wants a new controller knows at least
        the last view that it received.
        """
        self._tasks.start_service(self._publisher.serve())
        self._adopt(existing, known)
        numbers = count()
        while len(self.workers) < (self._num_before() or self._state.settings.num_workers):
            worker_id = f"worker-{next(numbers)}"
            if worker_id not in self.workers and worker_id not in self.view.members:
                self._supervision.add(worker_id)
        self._tasks.start_service(self._place_when_all_there())
        self._tasks.start_service(self.reconciler.serve(lambda: self._changing))

    def hopeless(self, waited_s: float, load_timeout_s: float) -> str:
        """Why the cluster will not come up; empty as long as it may, after it was waited for."""
        records, settings = running(self._state), self._state.settings
        return hopeless(records, self.failure, waited_s, settings.start_timeout_s, load_timeout_s)

    def used_bytes(self) -> Mapping[str, int]:
        """The memory that workers use on each node, by the plan."""
        return used_bytes(self._state.model, self._state.settings, running(self._state))

    def refusal(self, values: Mapping[str, Any]) -> str:
        """Why the cluster cannot take these settings while it runs; empty if it can."""
        changes = differences(self.declared.values, values)
        if other := anew(changes):
            return f"needs a new generation: {'; '.join(change.values for change in other)}"
        records, model = running(self._state), self._state.model
        if reason := refusal(changes, len(records)):
            return reason
        if any(change.effect is Effect.BY_WORKER for change in changes):
            reason = misfit(model, self.settings, records, values)
        return reason or misplaced(model, with_declared(self.settings, values), records)

    def declare(self, declared: Declared) -> None:
        """Takes settings that are wanted from now on, unless they are older than the present ones.

        The caller has checked that the cluster can take them (`refusal`).
        """
        if declared.at_s > self._state.declared.at_s:
            self._state.declare(declared)
            self._publisher.touch()
            self._state.changed.notify()

    def overtake(self, placement_epoch: int) -> None:
        """Moves the epoch beyond one that an earlier controller published, if it was higher."""
        self._publisher.overtake(placement_epoch)

    def close(self) -> None:
        """Stops supervising: no worker that dies is started again."""
        self._state.is_closed = True
        for record in self.workers.values():
            if record.task is not None:
                record.task.cancel()

    @property
    def declared(self) -> Declared:
        """The settings that are wanted."""
        return self._state.declared

    @property
    def settings(self) -> ControllerSettings:
        return self._state.settings

    @property
    def pending(self) -> list[str]:
        """What of the declared settings is not so yet, as texts for people."""
        return pending(self._state)

    @property
    def by_worker(self) -> dict[str, dict[str, Any]]:
        """What workers were started with where it is not declared so, by worker and name."""
        return by_worker(self._state)

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """Workers that have not confirmed the newest view, in order."""
        return self._publisher.behind

    @property
    def is_changing(self) -> bool:
        """Whether a change of the cluster goes on."""
        return self._changing is not None and not self._changing.is_done

    def scale(self, num_workers: int, now_s: float = 0.0) -> Task[None]:
        """Grows or shrinks; done when the new placement is served. `now_s` is since 1970.

        Fails with PlacementError if the change is impossible, and with StartupError if new workers
        do not come. After a failure, the cluster is as before.
        """
        accepted = partial(self._want, num_workers, now_s)
        return self._change(self._resizing.scale(num_workers, accepted))

    def drain(self, worker_id: str, *, restarts: bool = False, now_s: float = 0.0) -> Task[None]:
        """Moves a worker's experts and requests away, then stops or restarts the worker.

        Fails with PlacementError if no other worker can take the experts. A worker that has the
        only copy of attention layers may restart, and requests wait meanwhile.
        """
        return self._change(self._drain(worker_id, restarts, now_s))

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
            state.small_files = found.small_files or state.small_files
            record = WorkerRecord(found.worker_id, incarnation=found.incarnation)
            record.spawned, record.shards = found.spawned, found.shards
            record.held, record.is_adopted = found.held, True
            record.started_with = found.settings
            self._state.targets[found.worker_id] = found.shards
            self._supervision.supervise(record)
        self._state.declare(max([self.declared, *(v.declared for v in views)], key=_when))
        if "workers.count" not in self.declared.values and self._num_before():
            settings = replace(self._state.settings, num_workers=self._num_before())
            self._state.settings = settings
        for member in self.view.members.values():
            if member.state is WorkerState.STOPPED:
                self._state.last_incarnations[member.worker_id] = member.incarnation
            elif member.worker_id not in self.workers:
                # It is dead. Its next incarnation must have a higher number than its last one.
                record = WorkerRecord(member.worker_id, incarnation=member.incarnation)
                self._supervision.supervise(record)
                # The known view may still promise it.
                self._publisher.touch()

    def _num_before(self) -> int:
        """The number of workers that an earlier controller's view has."""
        members = self.view.members.values()
        return sum(member.state is not WorkerState.STOPPED for member in members)

    async def _drain(self, worker_id: str, restarts: bool, now_s: float) -> None:
        await self._resizing.drain(worker_id, restarts)
        if not restarts:
            self._want(len(running(self._state)), now_s)

    def _want(self, num_workers: int, now_s: float) -> None:
        """Declares another number of workers."""
        self._state.declare(self.declared.with_values({"workers.count": num_workers}, now_s))
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


def _when(declared: Declared) -> float:
    return declared.at_s
