"""What the controller commands: processes, and what is known of each."""

from dataclasses import dataclass
from typing import Protocol

from milliways.runtime.tasks import Pending, Task
from milliways.wire.errors import ClusterError
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.view import ClusterView, Member, WorkerState


def number_of(worker_id: str) -> int:
    """Of worker-7: 7."""
    return int(worker_id.rpartition("-")[2])


class WorkerDiedError(ClusterError):
    """A process is gone, or could not do what it was asked."""


@dataclass(slots=True)
class ControllerFigures:
    """Counts since the start, for status and metrics."""

    num_deaths: int = 0
    num_covers: int = 0
    num_views: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """Where a process came up."""

    address: str
    router_address: str
    node_id: str
    pid: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Existing:
    """A worker that a controller finds when it starts: another one started it."""

    worker_id: str
    incarnation: int
    spawned: Spawned
    shards: ShardPlan
    held: frozenset[ExpertId]
    # The newest that it was given.
    view: ClusterView


class Fleet(Protocol):
    """Starts processes and talks to them. Every pending value fails with WorkerDiedError."""

    def spawn(self, worker_id: str, incarnation: int) -> Pending[Spawned]: ...

    def lack(self, worker_id: str) -> str:
        """What is missing for a process that was asked for and is not there, for people."""
        ...

    def load(self, worker_id: str, shards: ShardPlan) -> Pending[None]:
        """Has it read its shards; what it holds already stays."""
        ...

    def unload(self, worker_id: str, kept: frozenset[ExpertId]) -> Pending[None]: ...

    def publish(self, worker_id: str, view: ClusterView) -> Pending[None]:
        """Gives its router a view."""
        ...

    def fence(self, worker_id: str, placement_epoch: int) -> Pending[None]:
        """Has it refuse older views from now on."""
        ...

    def drain(self, worker_id: str) -> Pending[None]:
        """Has its router hand its requests over to others."""
        ...

    def stop(self, worker_id: str) -> Pending[None]: ...

    def death(self, worker_id: str) -> Pending[None]:
        """Done when the process is gone."""
        ...


_NOWHERE = Spawned(address="", router_address="", node_id="", pid=0, memory_bytes=0)
_NOTHING = ShardPlan(first_layer=0, num_layers=0, has_ends=False, experts=frozenset())


@dataclass(slots=True)
class WorkerRecord:
    """What is known of a worker; `waits_for` is for people."""

    worker_id: str
    incarnation: int = 0
    state: WorkerState = WorkerState.LOADING
    spawned: Spawned | None = None
    shards: ShardPlan | None = None
    held: frozenset[ExpertId] = frozenset()
    # Asked for beyond that, and not there yet.
    loading: frozenset[ExpertId] = frozenset()
    waits_for: str = "its turn"
    num_quick_deaths: int = 0
    ready_at_s: float | None = None
    task: Task[None] | None = None
    is_leaving: bool = False
    # It is stopped on purpose, which is no death to be counted.
    is_drained: bool = False
    # Found alive by a controller that starts: it goes on with this life.
    is_adopted: bool = False
    last_error: str = ""

    def member(self) -> Member:
        """How others see it: before it has a process and shards too, so that a view has everybody.

        The next controller learns from it how many there were, and which of their lives.
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
