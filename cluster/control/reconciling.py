"""Brings the cluster to the settings that are declared, one step after another.

`next_step` decides, from the records alone. A step that fails leaves the cluster as it was; it is
tried again later, and `problem` says why it failed.
"""

import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from milliways.cluster.control.changes import BY_WORKER, Change, differences, is_outdated
from milliways.cluster.control.resizing import Resizing
from milliways.cluster.control.state import ClusterState
from milliways.cluster.control.targets import experts_of, num_replicas, number
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.runtime.tasks import Task
from milliways.wire.errors import ClusterError
from milliways.wire.view import WorkerState

logger = logging.getLogger(__name__)

TRY_AGAIN_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Grow or shrink to a number of workers."""

    num_workers: int


@dataclass(frozen=True, slots=True)
class Restart:
    """Drain a worker and start it again."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Share experts out anew: some have too many holders, or too few."""


Step = Scale | Restart | Spread
Start = Callable[[Coroutine[Any, Any, None]], Task[None]]


def running(state: ClusterState) -> list[WorkerRecord]:
    """The workers that are to run, in the order of their numbers."""
    records = (r for r in state.workers.values() if r.state is not WorkerState.STOPPED)
    return sorted(records, key=number)


def next_step(state: ClusterState) -> Step | None:
    """What is to be done next; None if nothing is, or if the cluster is not steady enough."""
    records = running(state)
    if state.failure is not None or any(r.worker_id not in state.targets for r in records):
        # The first placement is not there yet.
        return None
    num_wanted = state.settings.num_workers
    if len(records) != num_wanted:
        return Scale(num_wanted)
    if any(r.state is not WorkerState.READY or r.loading for r in records):
        return None
    for record in records:
        if is_outdated(record.started_with, state.declared.values):
            return Restart(record.worker_id)
    return Spread() if is_uneven(state) else None


def is_uneven(state: ClusterState) -> bool:
    """Whether an expert has more or fewer holders than it should."""
    records = running(state)
    wanted = num_replicas(state.settings, len(records))
    copies = Counter(expert for record in records for expert in record.held)
    return any(copies[expert] != wanted for expert in experts_of(state.model))


def pending(state: ClusterState) -> list[str]:
    """What of the declared settings is not so yet, as texts for people."""
    records, wanted = running(state), state.settings.num_workers
    texts: list[str] = []
    num_ready = sum(record.state is WorkerState.READY for record in records)
    if len(records) != wanted or num_ready != wanted:
        texts.append(f"workers.count: {wanted} declared, {num_ready} ready")
    for worker_id, changes in _outdated(state).items():
        texts += [f"{change.values}: {worker_id} is to be started again" for change in changes]
    return texts


def by_worker(state: ClusterState) -> dict[str, dict[str, Any]]:
    """What workers were started with where it is not declared so, by worker and name."""
    return {
        worker_id: {change.name: change.before for change in changes}
        for worker_id, changes in _outdated(state).items()
    }


def _outdated(state: ClusterState) -> dict[str, tuple[Change, ...]]:
    """The workers that are to be started again, in order, and why."""
    declared = state.declared.values
    found = {r.worker_id: differences(r.started_with, declared, BY_WORKER) for r in running(state)}
    return {worker_id: changes for worker_id, changes in found.items() if changes}


class Reconciler:
    """Takes steps while no other change of the cluster goes on."""

    def __init__(self, state: ClusterState, resizing: Resizing, start: Start) -> None:
        """`start` starts a change of the cluster; at most one runs at a time."""
        self.problem = ""
        # Whether a step goes on.
        self.is_stepping = False
        self._state = state
        self._resizing = resizing
        self._start = start
        # After an attempt that left experts as uneven as they were, the same one would be in vain.
        self._spread_in_vain: object = None

    def settled(self) -> bool:
        """Whether everything is as declared."""
        return next_step(self._state) is None and not pending(self._state)

    async def serve(self, changing: Callable[[], Task[None] | None]) -> None:
        """Takes steps, for ever; `changing` is the last change that was started."""
        tasks, state = self._state.tasks, self._state
        while not state.is_closed:
            busy = changing()
            if busy is not None and not busy.is_done:
                await tasks.first_done((busy,))
                continue
            step = self._next()
            if step is None:
                await state.changed.wait()
                continue
            logger.info("settings: %s", step)
            self.is_stepping = True
            change = self._start(self._run(step))
            await tasks.first_done((change,))
            self.is_stepping = False
            state.changed.notify()
            if isinstance(change.error, ClusterError):
                self.problem = str(change.error)
                logger.warning("settings: %s: %s", step, self.problem)
                await tasks.sleep(TRY_AGAIN_AFTER_S)
            else:
                # Any other error is a bug of ours, which must not be tried again and again.
                change.result()
                self.problem = ""

    def _next(self) -> Step | None:
        step = next_step(self._state)
        if isinstance(step, Spread):
            held = {r.worker_id: r.held for r in running(self._state)}
            if held == self._spread_in_vain:
                return None
            self._spread_in_vain = held
        return step

    async def _run(self, step: Step) -> None:
        match step:
            case Scale(num_workers):
                await self._resizing.scale(num_workers)
            case Restart(worker_id):
                await self._resizing.drain(worker_id, True)
            case Spread():
                await self._resizing.spread()
