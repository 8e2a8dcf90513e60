"""Decides who is in the cluster and who holds what: placement, supervision, rebalancing.

The life of a worker here, one task each (`_keep`):

1. `spawn` has a process started somewhere; it says where it is and how much memory it may use.
2. It waits for a placement, which is planned as soon as all workers asked for are there.
3. `load` has it read its shards; then it is READY and a new view tells everybody.
4. When it dies, a new view says so at once. If it was the last to hold an expert, others load that
   one. It is started again, after a pause that grows while it keeps dying.

A view goes to routers first and raises the workers' fences after: no router is refused for acting
on what it could not know yet. Nothing here is on the path of a token.

No clock, no thread, no Ray: `Fleet` starts and talks to processes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError, PlacementError
from cluster.fleet import Fleet, WorkerDiedError, WorkerRecord
from cluster.placement import (
    AttentionCut,
    AttentionShard,
    ExpertId,
    ModelBytes,
    PlacementPolicy,
    ShardPlan,
    WorkerMemory,
    plan,
)
from cluster.tasks import Pending, Signal, Task, Tasks
from cluster.view import EMPTY_VIEW, ClusterView, WorkerState, chains_of

logger = logging.getLogger(__name__)

BACKOFF_S = 0.2
BACKOFF_S_MAX = 30.0
# Who lives that long has come up well, and starts from the shortest pause again.
STABLE_AFTER_S = 60.0
MAX_QUICK_DEATHS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """What is wanted of the cluster."""

    num_workers: int
    policy: PlacementPolicy
    # 0: two where there are two workers, else one.
    expert_replicas: int = 0
    timeout_s: float = 5.0


@dataclass(slots=True)
class ControllerFigures:
    """Counts since the start, for status and metrics."""

    num_deaths: int = 0
    num_covers: int = 0
    num_views: int = 0


class Controller:
    """Owns placement and membership."""

    def __init__(
        self, model: ModelBytes, settings: ControllerSettings, fleet: Fleet, tasks: Tasks
    ) -> None:
        self.view: ClusterView = EMPTY_VIEW
        self.workers: dict[str, WorkerRecord] = {}
        self.figures = ControllerFigures()
        # Why the cluster cannot come up, if it cannot.
        self.failure: ClusterError | None = None
        self.changed = Signal()
        self._model = model
        self._settings = settings
        self._fleet = fleet
        self._tasks = tasks
        self._num_wanted = settings.num_workers
        self._targets: dict[str, ShardPlan] = {}
        self._placed = Signal()
        self._dirty = Signal()
        self._is_dirty = False
        self._told_epoch = 0
        self._covering: set[ExpertId] = set()
        self._scaling: Task[None] | None = None
        self._is_closed = False

    @property
    def is_complete(self) -> bool:
        """Whether every expert has a holder, and there is a router."""
        return not self._lost_experts() and bool(self.view.routers())

    def start(self) -> None:
        """Begins to bring the cluster up; `changed` tells of progress."""
        self._tasks.start_service(self._publish_changes())
        for number in range(self._num_wanted):
            self._hire(f"worker-{number}")
        self._tasks.start_service(self._place_when_all_there())

    def close(self) -> None:
        """Stops supervising: nobody who dies is started again."""
        self._is_closed = True
        for record in self.workers.values():
            if record.task is not None:
                record.task.cancel()

    def scale(self, num_workers: int) -> Task[None]:
        """Grows or shrinks; done when the new placement is served.

        Fails with PlacementError where it cannot be.
        """
        self._scaling = self._tasks.start(self._scale(num_workers))
        return self._scaling

    def drain(self, worker_id: str) -> Task[None]:
        """Moves a worker's experts and requests away; it stays, without work."""
        return self._tasks.start(self._drain(worker_id))

    # One worker

    def _hire(self, worker_id: str) -> None:
        record = WorkerRecord(worker_id)
        self.workers[worker_id] = record
        record.task = self._tasks.start_service(self._keep(record))

    async def _keep(self, record: WorkerRecord) -> None:
        while not self._is_closed and not record.is_leaving:
            try:
                await self._live(record)
            except WorkerDiedError as error:
                record.last_error = str(error)
                logger.warning("%s died: %s", record.worker_id, error)
            if record.is_leaving or self._is_closed:
                break
            self._died(record)
            await self._pause(record)

    async def _live(self, record: WorkerRecord) -> None:
        """One life of a worker; ends with WorkerDiedError, or when it leaves."""
        record.incarnation += 1
        record.state, record.held = WorkerState.LOADING, frozenset()
        record.ready_at_s = None
        self._note(record, "a node that has room for it")
        record.spawned = await self._fleet.spawn(record.worker_id, record.incarnation)
        self._note(record, "a placement, which needs all workers")
        while record.worker_id not in self._targets:
            await self._or_death(record, self._placed.wait())
        record.shards = self._targets[record.worker_id]
        self._note(record, "its shards to be loaded")
        await self._or_death(record, self._fleet.load(record.worker_id, record.shards))
        record.held = record.shards.experts
        record.state = WorkerState.READY
        record.ready_at_s = self._tasks.clock.now_s()
        self._note(record, "")
        self._touch()
        await self._fleet.death(record.worker_id)
        raise WorkerDiedError(f"the process of {record.worker_id} is gone")

    async def _or_death(self, record: WorkerRecord, pending: Pending[None]) -> None:
        """Waits for something, or for the worker's death."""
        death = self._fleet.death(record.worker_id)
        await self._tasks.first_done((pending, death))
        if not pending.is_done:
            raise WorkerDiedError(f"the process of {record.worker_id} is gone")
        pending.result()

    def _died(self, record: WorkerRecord) -> None:
        self.figures.num_deaths += 1
        now_s = self._tasks.clock.now_s()
        was_stable = record.ready_at_s is not None and now_s - record.ready_at_s > STABLE_AFTER_S
        record.num_quick_deaths = 0 if was_stable else record.num_quick_deaths + 1
        record.state, record.held = WorkerState.LOST, frozenset()
        self._touch()
        self._cover_losses()

    async def _pause(self, record: WorkerRecord) -> None:
        # The first restart is at once: most deaths come alone.
        exponent = max(0, record.num_quick_deaths - 2)
        delay_s = min(BACKOFF_S_MAX, BACKOFF_S * 2**exponent) if record.num_quick_deaths > 1 else 0
        is_loop = record.num_quick_deaths >= MAX_QUICK_DEATHS
        loop = f", it died {record.num_quick_deaths} times in a row" if is_loop else ""
        self._note(record, f"its restart in {delay_s:g} s{loop}")
        await self._tasks.sleep(delay_s)

    def _note(self, record: WorkerRecord, waits_for: str) -> None:
        record.waits_for = waits_for
        self.changed.notify()

    # Placement

    async def _place_when_all_there(self) -> None:
        while any(record.spawned is None for record in self.workers.values()):
            await self.changed.wait()
        try:
            self._targets = self._planned(list(self.workers.values()))
        except PlacementError as error:
            self.failure = error
            self.changed.notify()
            return
        self._placed.notify()

    def _planned(
        self,
        records: Sequence[WorkerRecord],
        attention: Mapping[str, AttentionShard] | None = None,
    ) -> dict[str, ShardPlan]:
        """Shards for these workers, in the order of their ids."""
        workers: list[WorkerMemory] = []
        for record in sorted(records, key=lambda record: _number(record.worker_id)):
            assert record.spawned is not None
            workers.append(
                WorkerMemory(
                    worker_id=record.worker_id,
                    node_id=record.spawned.node_id,
                    memory_bytes=record.spawned.memory_bytes,
                )
            )
        settings = self._settings
        replicas = settings.expert_replicas or min(2, len(workers))
        policy = PlacementPolicy(
            expert_replicas=replicas,
            attention=settings.policy.attention,
            kv_tokens=settings.policy.kv_tokens,
            spread_nodes=settings.policy.spread_nodes,
        )
        kept = [attention[worker.worker_id] for worker in workers] if attention else None
        placement = plan(self._model, workers, policy, attention=kept)
        return {w.worker.worker_id: ShardPlan.of(w) for w in placement.workers}

    # Views

    def _touch(self) -> None:
        """Something changed that everybody has to know."""
        self._is_dirty = True
        self._dirty.notify()

    async def _publish_changes(self) -> None:
        while True:
            if not self._is_dirty:
                await self._dirty.wait()
            self._is_dirty = False
            self.view = self._make_view()
            self.figures.num_views += 1
            self._fleet.save(self._saved())
            self.changed.notify()
            await self._tell_everybody(self.view)
            self._told_epoch = self.view.placement_epoch
            self.changed.notify()

    async def _everybody_knows(self) -> None:
        """Waits until the newest view, with all changes so far, has been told."""
        while self._is_dirty or self._told_epoch < self.view.placement_epoch:
            await self.changed.wait()

    def _make_view(self) -> ClusterView:
        members = {
            record.worker_id: member
            for record in self.workers.values()
            if (member := record.member()) is not None
        }
        shards = {
            member.worker_id: AttentionShard(
                first_layer=member.first_layer,
                num_layers=member.num_layers,
                has_ends=member.has_ends,
            )
            for member in members.values()
        }
        return ClusterView(
            placement_epoch=self.view.placement_epoch + 1,
            members=members,
            chains=chains_of(shards),
        )

    async def _tell_everybody(self, view: ClusterView) -> None:
        alive = [m.worker_id for m in view.members.values() if m.can_compute]
        await self._tasks.gather(self._tell(w, self._fleet.publish(w, view)) for w in alive)
        epoch = view.placement_epoch
        await self._tasks.gather(self._tell(w, self._fleet.fence(w, epoch)) for w in alive)

    async def _tell(self, worker_id: str, told: Pending[None]) -> None:
        """Waits within bounds: one who does not listen must not keep the others from knowing."""
        if not await self._tasks.wait_for(told, self._settings.timeout_s):
            logger.warning("%s does not answer", worker_id)

    def _saved(self) -> dict[str, Any]:
        return {
            "num_wanted": self._num_wanted,
            "placement_epoch": self.view.placement_epoch,
            "incarnations": {r.worker_id: r.incarnation for r in self.workers.values()},
        }

    # Lost experts

    def _lost_experts(self) -> set[ExpertId]:
        wanted = {
            ExpertId(layer, expert)
            for layer in range(self._model.num_layers)
            for expert in range(self._model.num_experts)
        }
        held = [r.held for r in self.workers.values() if r.state is not WorkerState.LOST]
        return wanted.difference(*held)

    def _cover_losses(self) -> None:
        """Has survivors load what nobody holds any more: the first of them as few as can be."""
        survivors = [r for r in self.workers.values() if r.state is WorkerState.READY]
        lost = sorted(self._lost_experts() - self._covering)
        if not survivors or not lost:
            return
        shares: dict[str, set[ExpertId]] = {record.worker_id: set() for record in survivors}
        for expert_id in lost:
            least = min(survivors, key=lambda r: len(r.held) + len(shares[r.worker_id]))
            shares[least.worker_id].add(expert_id)
        self._covering |= set(lost)
        for record in survivors:
            if shares[record.worker_id]:
                self._tasks.start(self._cover(record, frozenset(shares[record.worker_id])))

    async def _cover(self, record: WorkerRecord, experts: frozenset[ExpertId]) -> None:
        self.figures.num_covers += 1
        try:
            await self._load_more(record, experts)
        except WorkerDiedError as error:
            logger.warning("%s could not take over experts: %s", record.worker_id, error)
        finally:
            self._covering -= experts
        if record.state is not WorkerState.READY:
            self._cover_losses()

    async def _load_more(self, record: WorkerRecord, experts: frozenset[ExpertId]) -> None:
        assert record.shards is not None
        life = record.incarnation
        more = ShardPlan(
            first_layer=record.shards.first_layer,
            num_layers=record.shards.num_layers,
            has_ends=record.shards.has_ends,
            experts=record.held | experts,
        )
        await self._or_death(record, self._fleet.load(record.worker_id, more))
        if record.incarnation == life and record.state is not WorkerState.LOST:
            record.held |= experts
            self._touch()

    # Growing and shrinking

    async def _scale(self, num_workers: int) -> None:
        staying, leaving = self._split(num_workers)
        self._check_shrink(leaving)
        new = [f"worker-{n}" for n in range(num_workers) if f"worker-{n}" not in self.workers]
        self._num_wanted = num_workers
        for worker_id in new:
            self._targets.pop(worker_id, None)
            self._hire(worker_id)
        while any(self.workers[worker_id].spawned is None for worker_id in new):
            await self.changed.wait()
        try:
            targets = self._planned([*staying, *(self.workers[worker_id] for worker_id in new)])
            if self._is_cut():
                targets = self._planned_around_the_cut(staying, new)
        except PlacementError:
            self._dismiss_unplaced(new)
            raise
        self._targets = targets
        self._placed.notify()
        await self._tasks.gather(self._become(r, targets[r.worker_id]) for r in staying)
        while any(self.workers[w].state is not WorkerState.READY for w in targets):
            await self.changed.wait()
        await self._tasks.gather(self._retire(record) for record in leaving)
        await self._trim(staying)

    def _split(self, num_workers: int) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
        in_order = sorted(self.workers.values(), key=lambda r: _number(r.worker_id))
        staying = [r for r in in_order if _number(r.worker_id) < num_workers]
        return staying, [r for r in in_order if _number(r.worker_id) >= num_workers]

    def _is_cut(self) -> bool:
        """Whether attention is cut by layers: then a sequence's keys and values bind its shards."""
        return any(
            r.shards is not None and 0 < r.shards.num_layers < self._model.num_layers
            for r in self.workers.values()
        )

    def _check_shrink(self, leaving: Sequence[WorkerRecord]) -> None:
        for record in leaving:
            has_layers = record.shards is not None and record.shards.num_layers > 0
            if has_layers and self._is_cut():
                raise PlacementError(
                    f"{record.worker_id} holds layers of attention that no other worker has:"
                    " where attention is cut by layers, only workers without any can leave"
                )

    def _planned_around_the_cut(
        self, staying: Sequence[WorkerRecord], new: Sequence[str]
    ) -> dict[str, ShardPlan]:
        """New targets in which every shard of attention stays where its keys and values are."""
        none = AttentionShard(first_layer=self._model.num_layers, num_layers=0, has_ends=False)
        attention = {worker_id: none for worker_id in new}
        for record in staying:
            assert record.shards is not None
            attention[record.worker_id] = AttentionShard(
                first_layer=record.shards.first_layer,
                num_layers=record.shards.num_layers,
                has_ends=record.shards.has_ends,
            )
        records = [*staying, *(self.workers[worker_id] for worker_id in new)]
        return self._planned(records, attention)

    def _dismiss_unplaced(self, new: Sequence[str]) -> None:
        """The cluster stays as it is: those who came for the new placement go."""
        for worker_id in new:
            record = self.workers.pop(worker_id)
            record.is_leaving = True
            if record.task is not None:
                record.task.cancel()
            self._fleet.stop(worker_id)

    async def _become(self, record: WorkerRecord, target: ShardPlan) -> None:
        """Loads what a worker lacks; what it has too much it keeps until all are there."""
        if record.state is WorkerState.READY:
            missing = target.experts - record.held
            if missing:
                try:
                    await self._load_more(record, missing)
                except WorkerDiedError:
                    # Its next life loads the new target as a whole.
                    return

    async def _retire(self, record: WorkerRecord) -> None:
        """Lets a worker go without an error: no new requests, those it has move on."""
        record.is_leaving = True
        if record.state is WorkerState.READY:
            record.state = WorkerState.DRAINING
            self._touch()
            await self._tell(record.worker_id, self._fleet.drain(record.worker_id))
        del self.workers[record.worker_id]
        self._touch()
        # Whoever still acts on the old view gets answers until it has the new one.
        await self._everybody_knows()
        if record.task is not None:
            record.task.cancel()
        await self._tell(record.worker_id, self._fleet.stop(record.worker_id))

    async def _trim(self, staying: Sequence[WorkerRecord]) -> None:
        """Unloads what a worker holds beyond its target, after everybody knows not to ask it."""
        for record in staying:
            if record.state is WorkerState.READY:
                record.shards = self._targets[record.worker_id]
                surplus = record.held - record.shards.experts
                if surplus:
                    record.held -= surplus
                    self._touch()
        await self._everybody_knows()
        for record in staying:
            if record.state is WorkerState.READY:
                await self._tell(
                    record.worker_id, self._fleet.unload(record.worker_id, record.held)
                )

    async def _drain(self, worker_id: str) -> None:
        record = self.workers[worker_id]
        others = [r for r in self.workers.values() if r is not record]
        only_here = record.held.difference(
            *(r.held for r in others if r.state is WorkerState.READY)
        )
        ready = [r for r in others if r.state is WorkerState.READY]
        if only_here:
            if not ready:
                raise PlacementError(f"{worker_id} is the last worker that is ready")
            least = min(ready, key=lambda r: len(r.held))
            await self._load_more(least, only_here)
        record.state = WorkerState.DRAINING
        self._touch()
        await self._tell(worker_id, self._fleet.drain(worker_id))


def _number(worker_id: str) -> int:
    return int(worker_id.rpartition("-")[2])


def make_settings(
    num_workers: int, expert_replicas: int, attention: str, kv_tokens: int
) -> ControllerSettings:
    """Settings of the controller from those of the cluster."""
    return ControllerSettings(
        num_workers=num_workers,
        expert_replicas=expert_replicas,
        policy=PlacementPolicy(attention=AttentionCut(attention), kv_tokens=kv_tokens),
    )
