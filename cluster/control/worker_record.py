"""What the controller knows of a worker, through all of its incarnations."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from milliways.cluster.control.fleet import Spawned
from milliways.runtime.tasks import Task
from milliways.wire.errors import ClusterError
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.view import Member, WorkerState, moved

logger = logging.getLogger(__name__)

_NOWHERE = Spawned(address="", router_address="", node_id="", pid=0, memory_bytes=0)
_NOTHING = ShardPlan(first_layer=0, num_layers=0, has_ends=False, experts=frozenset())


@dataclass(slots=True)
class WorkerRecord:
    """What is known of a worker; `waits_for` is for people.

    Invariants: `state` changes in `move` alone, along `WORKER_MOVES`. `incarnation` only grows.
    `held` is what this incarnation has loaded and views promise; empty once it is LOST. `loading`
    is what it was asked to load beyond `held`, and has not yet.
    """

    worker_id: str
    incarnation: int = 0
    spawned: Spawned | None = None
    shards: ShardPlan | None = None
    held: frozenset[ExpertId] = frozenset()
    loading: frozenset[ExpertId] = frozenset()
    waits_for: str = "its turn"
    # Deaths in a row, each soon after the worker was READY or before it was.
    num_quick_deaths: int = 0
    ready_at_s: float | None = None
    # Tries to load, in a row, that failed.
    num_failed_loads: int = 0
    # The task that supervises it.
    task: Task[None] | None = None
    # If true, it is not started again when it ends.
    is_leaving: bool = False
    # If true, it is stopped on purpose, which does not count as a death.
    is_drained: bool = False
    # If true, a new controller found it alive, and goes on with this incarnation.
    is_adopted: bool = False
    last_error: str = ""
    # The settings with which this incarnation was started, by name.
    started_with: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _state: WorkerState = WorkerState.LOADING

    @property
    def state(self) -> WorkerState:
        return self._state

    def move(self, to: WorkerState) -> None:
        """Changes the state, along `WORKER_MOVES`."""
        self._state = moved(self._state, to)

    def begin_incarnation(self) -> None:
        """The worker is about to be started, for the first time or again."""
        self.incarnation += 1
        if self._state is not WorkerState.LOADING:
            self.move(WorkerState.LOADING)
        self.held = frozenset()
        self.ready_at_s = None

    def note_failed_load(self, error: ClusterError) -> None:
        """It could not load a file; `error` says which and why."""
        self.num_failed_loads += 1
        if self.last_error != str(error):
            # Not at every try.
            logger.warning("%s", error)
        self.last_error = str(error)

    def note_load(self, faults: Sequence[str] = ()) -> None:
        """It has loaded what it was asked to load; parts of files with `faults` from others."""
        if self.num_failed_loads:
            self.num_failed_loads, self.last_error = 0, ""
        if faults:
            more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
            self.last_error = (
                f"{self.worker_id} took parts from other workers, because of its files:"
                f" {faults[0]}{more}"
            )
            logger.warning("%s", self.last_error)

    def member(self) -> Member:
        """How others see it: before it has a process and shards too, so that a view has everybody.

        The next controller learns from it how many workers there were, and their incarnations.
        """
        spawned, shards = self.spawned or _NOWHERE, self.shards or _NOTHING
        return Member(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            address=spawned.address,
            router_address=spawned.router_address,
            state=self.state,
            node_id=spawned.node_id,
            pid=spawned.pid,
            first_layer=shards.first_layer,
            num_layers=shards.num_layers,
            has_ends=shards.has_ends,
            experts=self.held,
        )
