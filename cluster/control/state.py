"""What the controller knows and wants, which all of its parts share."""

from dataclasses import dataclass

from milliways.cluster.control.fleet import Fleet
from milliways.cluster.control.targets import ControllerSettings, experts_of, with_declared
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.model.manifest import EMPTY_MANIFEST
from milliways.model.small_files import SmallFiles
from milliways.runtime.tasks import Signal, Tasks
from milliways.wire.errors import ClusterError
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.view import Declared, WorkerState


@dataclass(slots=True)
class ControllerFigures:
    """Counts since the start, for status and metrics."""

    num_deaths: int = 0
    num_take_overs: int = 0
    num_views: int = 0


class ClusterState:
    """Workers, targets and counts. `changed` fires whenever one of them, or the view, changed.

    Invariants: a key of `workers` is its record's `worker_id`. `last_incarnations` has, for each
    worker that ever was started here, the highest incarnation. `once_held` only grows: experts that
    some worker held when it died.
    """

    def __init__(
        self,
        model: ModelBytes,
        settings: ControllerSettings,
        fleet: Fleet,
        tasks: Tasks,
        generation: int = 1,
    ) -> None:
        # The number of the generation of these workers.
        self.generation = generation
        self.model = model
        self.settings = settings
        self.declared = Declared()
        self.fleet = fleet
        self.tasks = tasks
        self.workers: dict[str, WorkerRecord] = {}
        # What each worker is to hold. A worker without a placement has no entry.
        self.targets: dict[str, ShardPlan] = {}
        self.last_incarnations: dict[str, int] = {}
        self.once_held: set[ExpertId] = set()
        self.figures = ControllerFigures()
        # Why the cluster cannot come up, if it cannot.
        self.failure: ClusterError | None = None
        # What the bytes of the model are: fixed, part by part, by the first worker that loads it.
        self.manifest = EMPTY_MANIFEST
        # Whether the manifest has every part of the model; never false again.
        self.manifest_is_whole = False
        # The files beside the tensors, as a worker with the bytes of the manifest has read them.
        self.small_files: SmallFiles | None = None
        self.changed = Signal()
        # `targets` has new workers.
        self.placed = Signal()
        self.is_closed = False

    def declare(self, declared: Declared) -> None:
        """Takes settings that are wanted from now on. Each field of `settings` that has a name in
        them follows.
        """
        self.declared = declared
        self.settings = with_declared(self.settings, declared.values)

    def ready(self, besides: WorkerRecord | None = None) -> list[WorkerRecord]:
        """The workers that are READY, without one of them."""
        state = WorkerState.READY
        return [r for r in self.workers.values() if r.state is state and r is not besides]

    def only_held_by(self, record: WorkerRecord) -> frozenset[ExpertId]:
        """The experts that no other ready worker holds."""
        return record.held.difference(*(r.held for r in self.ready(besides=record)))

    def lost_experts(self) -> set[ExpertId]:
        """The experts that no worker holds."""
        held = [r.held for r in self.workers.values() if r.state is not WorkerState.LOST]
        return experts_of(self.model).difference(*held)

    def note(self, record: WorkerRecord, waits_for: str) -> None:
        """Notes what a worker waits for, for people."""
        record.waits_for = waits_for
        self.changed.notify()
