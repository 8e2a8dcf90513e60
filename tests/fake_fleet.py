"""A fleet of fake workers on a fake clock: they obey, do not answer, or die, as a test chooses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from milliways.cluster.control.controller import Controller
from milliways.cluster.control.fleet import (
    Existing,
    Loaded,
    LoadFailedError,
    Spawned,
    WorkerDiedError,
)
from milliways.cluster.control.planner import AttentionCut, PlacementPolicy
from milliways.cluster.control.targets import ControllerSettings
from milliways.model.manifest import EMPTY_MANIFEST, Manifest
from milliways.model.small_files import SmallFiles
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.view import ClusterView, Member, WorkerState

# Two layers of four experts of 10 bytes each; all of attention takes 20 bytes.
MODEL = ModelBytes(
    num_layers=2,
    num_experts=4,
    expert_bytes=10,
    attention_layer_bytes=8,
    end_bytes=2,
    kv_layer_bytes_per_token=1,
)
KV_TOKENS = 1
PLENTY_BYTES = 1000
EVERY_EXPERT = frozenset(ExpertId(layer, expert) for layer in range(2) for expert in range(4))
SPAWN_S = 1.0
LOAD_S = 2.0
# Digests of the bytes of the model, and of others.
RIGHT, WRONG = "a" * 32, "b" * 32


@dataclass(slots=True)
class FakeWorker:
    """One incarnation of a worker, and the commands that it received."""

    worker_id: str
    incarnation: int
    death: Pending[None] = field(default_factory=Pending)
    shards: ShardPlan | None = None
    held: frozenset[ExpertId] = frozenset()
    found: Manifest = EMPTY_MANIFEST
    views: list[ClusterView] = field(default_factory=list)
    fences: list[int] = field(default_factory=list)
    is_draining: bool = False
    waiting: list[Pending[Any]] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        return not self.death.is_done

    def held_bytes(self) -> int:
        """Bytes of everything that it holds."""
        if self.shards is None:
            return 0
        layer_bytes = MODEL.attention_layer_bytes + MODEL.kv_layer_bytes_per_token * KV_TOKENS
        attention_bytes = self.shards.num_layers * layer_bytes
        ends_bytes = MODEL.end_bytes * self.shards.has_ends
        return attention_bytes + ends_bytes + len(self.held) * MODEL.expert_bytes


class FakeFleet:
    """A `Fleet`. It asserts that it never receives a wrong command."""

    def __init__(self, tasks: Tasks, memory_bytes: int) -> None:
        self.all_workers: list[FakeWorker] = []
        self.now: dict[str, FakeWorker] = {}
        self.stopped: list[str] = []
        # Workers without a node, and workers that do not answer.
        self.without_node: set[str] = set()
        self.silent: set[str] = set()
        self.dies_loading: set[str] = set()
        # Workers whose disk cannot be read, and what the bytes on the disks of others are.
        self.unreadable: set[str] = set()
        # Workers whose configuration cannot be read, and what those of others have read.
        self.cannot_start: set[str] = set()
        self.small_files: SmallFiles | None = None
        self.contents: dict[str, str] = {}
        self.memory_bytes = memory_bytes
        self._tasks = tasks

    def spawn(
        self, worker_id: str, incarnation: int, small_files: SmallFiles | None
    ) -> Pending[Spawned]:
        worker = FakeWorker(worker_id, incarnation)
        assert all(
            w.incarnation < incarnation for w in self.all_workers if w.worker_id == worker_id
        )
        self.all_workers.append(worker)
        self.now[worker_id] = worker
        where = Spawned(
            address=f"{worker_id}:{incarnation}",
            router_address=f"{worker_id}:r{incarnation}",
            node_id=f"node-of-{worker_id}",
            pid=100 * incarnation,
            memory_bytes=self.memory_bytes,
        )
        if worker_id in self.without_node:
            return Pending()
        if worker_id in self.cannot_start and small_files is None:
            return self._after(SPAWN_S, worker, self._fail_to_start)
        return self._after(SPAWN_S, worker, lambda: where)

    def _fail_to_start(self) -> Spawned:
        raise LoadFailedError("cannot load: /m/config.json: cannot be read")

    def load(
        self, worker_id: str, shards: ShardPlan, wanted: Manifest, peers: Sequence[Member]
    ) -> Pending[Loaded]:
        worker = self._alive(worker_id)

        def take_in() -> Loaded:
            found = self._read(worker_id, shards)
            if differing := wanted.differing(found):
                raise LoadFailedError(f"{worker_id} cannot load: {differing[0]} is another")
            worker.shards = shards
            worker.held |= shards.experts
            assert worker.held_bytes() <= self.memory_bytes, "out of memory"
            worker.found = worker.found.with_all(found)
            return Loaded(worker.found, small_files=self.small_files)

        if worker_id not in self.dies_loading:
            return self._after(LOAD_S, worker, take_in)
        # It dies after the other workers are ready.
        self._tasks.call_later(1.5 * LOAD_S, lambda: self.kill(worker_id))
        return self._after(2 * LOAD_S, worker, take_in)

    def _read(self, worker_id: str, shards: ShardPlan) -> Manifest:
        """The digests of what its disk has."""
        if worker_id in self.unreadable:
            raise LoadFailedError(f"{worker_id} cannot load: /m/tensor00007_000: is missing")
        content = self.contents.get(worker_id, RIGHT)
        return Manifest({f"expert {e.layer}.{e.expert}": content for e in shards.experts})

    def unload(self, worker_id: str, kept: frozenset[ExpertId]) -> Pending[None]:
        worker = self._alive(worker_id)
        for other in self.now.values():
            # An expert that another worker's view promises must not be unloaded.
            if other.is_alive and other.views and other.worker_id not in self.silent:
                promised = other.views[-1].members[worker_id].experts
                assert promised <= kept, "it unloads experts that others may call"
        worker.held &= kept
        return self._after(0.0, worker, lambda: None)

    def publish(self, worker_id: str, view: ClusterView) -> Pending[None]:
        worker = self._alive(worker_id)
        if worker_id in self.silent:
            return Pending()
        if worker.views:
            assert view.placement_epoch >= worker.views[-1].placement_epoch, "an older view"
        worker.views.append(view)
        return self._after(0.0, worker, lambda: None)

    def fence(self, worker_id: str, placement_epoch: int) -> Pending[None]:
        worker = self._alive(worker_id)
        if worker_id in self.silent:
            return Pending()
        for member in worker.views[-1].members.values():
            router = self.now[member.worker_id]
            if member.can_compute and router.is_alive and router.worker_id not in self.silent:
                assert router.views, "its calls would be refused"
                assert router.views[-1].placement_epoch >= placement_epoch, "refused unwarned"
        worker.fences.append(placement_epoch)
        return self._after(0.0, worker, lambda: None)

    def drain(self, worker_id: str) -> Pending[None]:
        worker = self._alive(worker_id)
        worker.is_draining = True
        return self._after(0.5, worker, lambda: None)

    def stop(self, worker_id: str) -> Pending[None]:
        self.stopped.append(worker_id)
        if worker_id in self.now:
            self.kill(worker_id)
        stopped: Pending[None] = Pending()
        stopped.resolve(None)
        return stopped

    def death(self, worker_id: str) -> Pending[None]:
        return self.now[worker_id].death

    def missing_resource(self, worker_id: str) -> str:
        return "a node with 1 FAKE"

    def kill(self, worker_id: str) -> None:
        """A worker dies: its pending commands fail, and its death is reported."""
        worker = self.now[worker_id]
        for pending in worker.waiting:
            pending.fail(WorkerDiedError(f"{worker_id} is dead"))
        worker.death.resolve(None)

    def _alive(self, worker_id: str) -> FakeWorker:
        return self.now[worker_id]

    def _after(self, delay_s: float, worker: FakeWorker, make: Callable[[], Any]) -> Pending[Any]:
        answer: Pending[Any] = Pending()
        if not worker.is_alive:
            answer.fail(WorkerDiedError(f"{worker.worker_id} is dead"))
            return answer
        worker.waiting.append(answer)

        def give() -> None:
            if worker.is_alive:
                try:
                    answer.resolve(make())
                except LoadFailedError as error:
                    answer.fail(error)

        self._tasks.call_later(delay_s, give)
        return answer


class Bench:
    """A controller over a fake fleet, in fake time."""

    def __init__(
        self,
        num_workers: int,
        *,
        replicas: int = 2,
        cut: AttentionCut = AttentionCut.REPLICATED,
        memory_bytes: int = PLENTY_BYTES,
        experts_only: int = 0,
    ) -> None:
        self.clock = FakeClock()
        self.tasks = Tasks(self.clock)
        self.fleet = FakeFleet(self.tasks, memory_bytes)
        settings = ControllerSettings(
            num_workers=num_workers,
            expert_replicas=replicas,
            policy=PlacementPolicy(attention=cut, kv_tokens=KV_TOKENS),
            start_timeout_s=60.0,
            experts_only=experts_only,
        )
        self.controller = Controller(MODEL, settings, self.fleet, self.tasks)

    def start(self, existing: Sequence[Existing] = ()) -> "Bench":
        self.controller.start(existing)
        return self

    def run_for(self, seconds: float) -> None:
        end_s = self.clock.now_s() + seconds
        while True:
            if self.tasks.run_ready():
                continue
            next_s = self.tasks.next_timer_s()
            if next_s is None or next_s > end_s:
                break
            self.clock.advance_to(next_s)
        self.clock.advance_to(end_s)

    def run_until(self, holds: Callable[[], bool], limit_s: float = 300.0) -> float:
        """Runs until a condition holds; returns how long that took."""
        started_s = self.clock.now_s()
        while not holds():
            if self.tasks.run_ready():
                continue
            next_s = self.tasks.next_timer_s()
            assert next_s is not None, "nothing will ever happen again"
            assert next_s <= started_s + limit_s, f"not so within {limit_s} s"
            self.clock.advance_to(next_s)
        return self.clock.now_s() - started_s

    def up(self) -> "Bench":
        """Runs until all workers are ready and informed, and nothing is pending."""
        self.run_for(0.0)
        self.run_until(self.is_up)
        self.run_for(2.0)
        return self

    def is_up(self) -> bool:
        records = self.controller.workers.values()
        return self.controller.is_complete and all(
            record.state is WorkerState.READY for record in records
        )

    def replicas(self) -> dict[ExpertId, int]:
        """Number of holders of each expert in the view."""
        view = self.controller.view
        return {expert_id: len(view.holders(expert_id)) for expert_id in EVERY_EXPERT}

    def check(self) -> None:
        """Asserts that workers hold exactly the experts that the view says."""
        view = self.controller.view
        for member in view.members.values():
            worker = self.fleet.now[member.worker_id]
            if member.can_compute:
                assert worker.is_alive and worker.incarnation == member.incarnation
                assert worker.held == member.experts
                assert worker.views[-1] == view
                assert worker.fences[-1] == view.placement_epoch
