"""What the controller commands: the processes of workers, wherever they run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from milliways.model.manifest import EMPTY_MANIFEST, Manifest
from milliways.model.small_files import SmallFiles
from milliways.runtime.tasks import Pending
from milliways.wire.errors import ClusterError
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.view import ClusterView, Member


def number_of(worker_id: str) -> int:
    """Of worker-7: 7."""
    return int(worker_id.rpartition("-")[2])


class WorkerDiedError(ClusterError):
    """A process is gone, or could not do what it was asked to do."""


class LoadFailedError(ClusterError):
    """A process could not load a part of its shards; it lives, keeps the rest, and may try again.

    The text names the worker, the file and the tensor.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """Where a process came up."""

    address: str
    router_address: str
    node_id: str
    pid: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load came to: the digests of all that a worker holds, and files that are at fault.

    What is in those files came from other workers.
    """

    manifest: Manifest
    faults: tuple[str, ...] = ()
    # The contents of the files beside the tensors, for the next process that starts.
    small_files: SmallFiles | None = None


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
    # The digests of what it has loaded.
    manifest: Manifest = EMPTY_MANIFEST
    small_files: SmallFiles | None = None
    # The settings with which it was started, by name.
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Fleet(Protocol):
    """Starts processes and talks to them. If that is impossible, fails with WorkerDiedError."""

    def spawn(
        self, worker_id: str, incarnation: int, small_files: SmallFiles | None
    ) -> Pending[Spawned]:
        """Starts a process, and ends the one before it.

        The process goes by `small_files`, which another one has read. Without them it reads its
        own, and may also fail with LoadFailedError: one of them cannot be read.
        """
        ...

    def missing_resource(self, worker_id: str) -> str:
        """The reason, as a text for people, why a process that was asked for is not there yet."""
        ...

    def load(
        self, worker_id: str, shards: ShardPlan, wanted: Manifest, peers: Sequence[Member]
    ) -> Pending[Loaded]:
        """Makes the worker read its shards. It keeps what it holds already.

        It may fetch from `peers`, which are ready, what it cannot read from files.

        It refuses bytes that differ from `wanted`, which may have digests of some parts only; the
        result has the digests of all that it holds. May also fail with LoadFailedError.
        """
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
