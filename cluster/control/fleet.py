"""What the controller commands: the processes of workers, wherever they run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from milliways.runtime.tasks import Pending
from milliways.wire.errors import ClusterError
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.view import ClusterView


def number_of(worker_id: str) -> int:
    """Of worker-7: 7."""
    return int(worker_id.rpartition("-")[2])


class WorkerDiedError(ClusterError):
    """A process is gone, or could not do what it was asked to do."""


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
    """A running worker that a controller finds when it starts; an earlier controller started it."""

    worker_id: str
    incarnation: int
    spawned: Spawned
    shards: ShardPlan
    held: frozenset[ExpertId]
    # The newest view that it was given.
    view: ClusterView
    # The settings with which it was started, by name.
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Fleet(Protocol):
    """Starts processes and talks to them. If that is impossible, fails with WorkerDiedError."""

    def spawn(self, worker_id: str, incarnation: int) -> Pending[Spawned]: ...

    def missing_resource(self, worker_id: str) -> str:
        """The reason, as a text for people, why a process that was asked for is not there yet."""
        ...

    def load(self, worker_id: str, shards: ShardPlan) -> Pending[None]:
        """Makes the worker read its shards. It keeps what it holds already."""
        ...

    def unload(self, worker_id: str, kept: frozenset[ExpertId]) -> Pending[None]: ...

    def publish(self, worker_id: str, view: ClusterView) -> Pending[None]:
        """Gives the worker's router a view."""
        ...

    def fence(self, worker_id: str, placement_epoch: int) -> Pending[None]:
        """Makes the worker refuse older views from now on."""
        ...

    def drain(self, worker_id: str) -> Pending[None]:
        """Makes the worker's router hand its requests over to other routers."""
        ...

    def stop(self, worker_id: str) -> Pending[None]: ...

    def death(self, worker_id: str) -> Pending[None]:
        """Done when the process is gone."""
        ...
