"""Decides who is in the cluster and who holds what: placement and supervision.

The life of a worker here, one task each (`_keep`):

1. `spawn` has a process started somewhere; it says where it is and how much memory it may use.
2. It waits for a placement, which is planned as soon as all workers asked for are there.
3. `load` has it read its shards; then it is READY and a new view tells everybody.
4. When it dies, a new view says so at once. Others load the experts that it alone held. It starts
   again, after a pause that grows while it keeps dying.

Routers get a view before workers raise their fences to it: no router is refused for acting on what
it cannot know yet. No token waits for anything here. No clock, thread or Ray: `Fleet` has those.
"""

import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from milliways.cluster.control.fleet import (
    ControllerFigures,
    Existing,
    Fleet,
    WorkerDiedError,
    WorkerRecord,
)
from milliways.cluster.control.restarts import loop_note, quick_deaths, restart_delay_s
from milliways.cluster.control.targets import (
    ControllerSettings,
    attention_of,
    check_shrink,
    experts_of,
    planned,
    planned_anew,
    shared_out,
    split_workers,
)
from milliways.runtime.tasks import Pending, Signal, Task, Tasks
from milliways.wire.errors import ClusterError, PlacementError, StartupError
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.view import EMPTY_VIEW, ClusterView, WorkerState, chains_of

logger = logging.getLogger(__name__)

# What a record waits for until there is a process; the fleet knows more.
A_NODE = "a node that has room for it"


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
        self._targets: dict[str, ShardPlan] = {}
        self._lives: dict[str, int] = {}
        self._placed = Signal()
        self._dirty = Signal()
        self._is_dirty = False
        self._told_epoch = 0
        self._covering: set[ExpertId] = set()
        self._once_held: set[ExpertId] = set()
        self._changing: Task[None] | None = None
        self._untold: set[str] = set()
        self._is_closed = False

    @property
    def is_complete(self) -> bool:
        """Whether every expert has a holder, and there is a router."""
        return not self._lost_experts() and bool(self.view.routers())

    def start(self, existing: Sequence[Existing] = (), known: ClusterView = EMPTY_VIEW) -> None:
        """Begins to bring the cluster up, or goes on with the workers that there are.

        `changed` tells of progress. Nothing is saved anywhere: what a controller knew, its workers
        know, and they serve on while there is none. Where they died too, whoever asks for a new
        controller knows at least the last view that it was told.
        """
        self._tasks.start_service(self._publish_changes())
        self._adopt(existing, known)
        num_wanted = len(self.view.members) or self._settings.num_workers
        for number in range(num_wanted):
            if f"worker-{number}" not in self.workers:
                self._hire(f"worker-{number}")
        self._tasks.start_service(self._place_when_all_there())

    def overtake(self, placement_epoch: int) -> None:
        """Somebody knows of an earlier controller's view that is later than ours: not for long."""
        if placement_epoch > self.view.placement_epoch:
            self.view = replace(self.view, placement_epoch=placement_epoch)
            self._touch()

    def _adopt(self, existing: Sequence[Existing], known: ClusterView) -> None:
        views = [known, *(e.view for e in existing)]
        self.view = max(views, key=lambda view: view.placement_epoch)
        self._told_epoch = self.view.placement_epoch
        for found in existing:
            record = WorkerRecord(found.worker_id, incarnation=found.incarnation)
            record.spawned, record.shards = found.spawned, found.shards
            record.held, record.is_adopted = found.held, True
            self._targets[found.worker_id] = found.shards
            self._supervise(record)
        for member in self.view.members.values():
            if member.worker_id not in self.workers:
                # Dead by now. Its next life must be told from its last.
                record = WorkerRecord(member.worker_id, incarnation=member.incarnation)
                self._supervise(record)

    def close(self) -> None:
        """Stops supervising: nobody who dies is started again."""
        self._is_closed = True
        for record in self.workers.values():
            if record.task is not None:
                record.task.cancel()

    def scale(self, num_workers: int) -> Task[None]:
        """Grows or shrinks; done when the new placement is served.

        Fails with PlacementError where it cannot be, with StartupError where new workers do not
        come; all is as before then.
        """
        return self._change(self._scale(num_workers))

    def drain(self, worker_id: str, *, restarts: bool = False) -> Task[None]:
        """Moves a worker's experts and requests away, then stops it, or starts it anew.

        Fails with PlacementError where nobody can. Layers of attention that nobody else has may go
        for a restart: requests wait.
        """
        return self._change(self._drain(worker_id, restarts))

    def _change(self, steps: Coroutine[Any, Any, None]) -> Task[None]:
        """Starts a change of who holds what; one at a time, from where all is settled."""
        if self._changing is not None and not self._changing.is_done:
            steps.close()
            return self._tasks.start(self._refuse_change())
        self._changing = self._tasks.start(steps)
        return self._changing

    async def _refuse_change(self) -> None:
        raise PlacementError("another change of the cluster goes on; ask again when it is done")

    def waits_for(self, record: WorkerRecord) -> str:
        """What a worker waits for now, for people; empty where it waits for nothing."""
        waits_for = record.waits_for
        return self._fleet.lack(record.worker_id) if waits_for == A_NODE else waits_for

    # One worker

    def _hire(self, worker_id: str) -> None:
        # No life has the number of an earlier one, also where the worker had left.
        record = WorkerRecord(worker_id, incarnation=self._lives.get(worker_id, 0))
        self._supervise(record)

    def _supervise(self, record: WorkerRecord) -> None:
        self.workers[record.worker_id] = record
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
        """One life of a worker; ends with WorkerDiedError."""
        if record.is_adopted:
            record.is_adopted = False
        else:
            await self._come_up(record)
        record.state = WorkerState.READY
        record.ready_at_s = self._tasks.clock.now_s()
        self._note(record, "")
        self._touch()
        self._tasks.start(self._trim([*self.workers.values()]))
        await self._fleet.death(record.worker_id)
        raise WorkerDiedError(f"the process of {record.worker_id} is gone")

    async def _come_up(self, record: WorkerRecord) -> None:
        """From nothing to all shards loaded."""
        record.incarnation += 1
        self._lives[record.worker_id] = record.incarnation
        record.state, record.held = WorkerState.LOADING, frozenset()
        record.ready_at_s = None
        self._note(record, A_NODE)
        record.spawned = await self._fleet.spawn(record.worker_id, record.incarnation)
        self._note(record, "a placement, which needs all workers")
        while record.worker_id not in self._targets:
            await self._or_death(record, self._placed.wait())
        self._note(record, "its shards to be loaded")
        # Again where it shall hold others by the time it is through; no more where it is to go.
        loaded: ShardPlan | None = None
        while loaded != (target := self._targets.get(record.worker_id, loaded)):
            assert target is not None
            record.shards = loaded = target
            await self._or_death(record, self._fleet.load(record.worker_id, loaded))
            record.held |= loaded.experts

    async def _or_death(self, record: WorkerRecord, pending: Pending[None]) -> None:
        """Waits for something, or for the worker's death."""
        death = self._fleet.death(record.worker_id)
        await self._tasks.first_done((pending, death))
        if not pending.is_done:
            raise WorkerDiedError(f"the process of {record.worker_id} is gone")
        pending.result()

    def _died(self, record: WorkerRecord) -> None:
        if record.is_drained:
            record.is_drained = False
        else:
            self.figures.num_deaths += 1
            now_s = self._tasks.clock.now_s()
            record.num_quick_deaths = quick_deaths(record, now_s)
        self._once_held |= record.held
        record.state, record.held = WorkerState.LOST, frozenset()
        self._touch()
        self._cover_losses()

    async def _pause(self, record: WorkerRecord) -> None:
        delay_s = restart_delay_s(record, others_serve=self.is_complete)
        self._note(record, f"its restart in {delay_s:g} s{loop_note(record)}")
        await self._tasks.sleep(delay_s)

    def _note(self, record: WorkerRecord, waits_for: str) -> None:
        record.waits_for = waits_for
        self.changed.notify()

    # Placement

    async def _place_when_all_there(self) -> None:
        while any(record.spawned is None for record in self.workers.values()):
            await self.changed.wait()
        try:
            # Those who have their shards already keep them.
            self._targets = (
                planned(self._model, self._settings, list(self.workers.values())) | self._targets
            )
        except PlacementError as error:
            self.failure = error
            self.changed.notify()
            return
        self._placed.notify()

    # Views

    def _touch(self) -> None:
        """Something changed that everybody has to know."""
        self._is_dirty = True
        self._dirty.notify()

    async def _publish_changes(self) -> None:
        while True:
            if not self._is_dirty:
                await self._wait_for_news()
            if self._is_dirty:
                self._is_dirty = False
                self.view = self._make_view()
                self.figures.num_views += 1
                self.changed.notify()
            telling = self._tasks.start(self._tell_everybody(self.view))
            await self._tasks.first_done((telling, self._dirty.wait()))
            if telling.is_done:
                self._told_epoch = self.view.placement_epoch
                self.changed.notify()
            # Else there are news; who has not answered yet must not keep the others from them.
            telling.cancel()

    async def _wait_for_news(self) -> None:
        """Until there are some, or it is time to tell those who did not listen once more."""
        if self._untold:
            await self._tasks.wait_for(self._dirty.wait(), self._settings.timeout_s)
        else:
            await self._dirty.wait()

    async def _everybody_knows(self) -> None:
        """Waits until the newest view, with all changes so far, has been told."""
        while self._is_dirty or self._told_epoch < self.view.placement_epoch:
            await self.changed.wait()

    def _make_view(self) -> ClusterView:
        members = {record.worker_id: record.member() for record in self.workers.values()}
        shards = {
            record.worker_id: attention_of(record.shards)
            for record in self.workers.values()
            if record.shards is not None
        }
        return ClusterView(
            placement_epoch=self.view.placement_epoch + 1,
            members=members,
            chains=chains_of(shards, self._model.num_layers),
        )

    async def _tell_everybody(self, view: ClusterView) -> None:
        alive = [m.worker_id for m in view.members.values() if m.can_compute]
        self._untold = set()
        await self._tasks.gather(self._tell(w, self._fleet.publish(w, view)) for w in alive)
        epoch = view.placement_epoch
        await self._tasks.gather(self._tell(w, self._fleet.fence(w, epoch)) for w in alive)

    async def _tell(self, worker_id: str, told: Pending[None]) -> None:
        """Waits within bounds: one who does not listen must not keep the others from knowing."""
        if not await self._tasks.wait_for(told, self._settings.timeout_s):
            logger.warning("%s does not answer", worker_id)
            self._untold.add(worker_id)

    # Lost experts

    def _lost_experts(self) -> set[ExpertId]:
        held = [r.held for r in self.workers.values() if r.state is not WorkerState.LOST]
        return experts_of(self._model).difference(*held)

    def _cover_losses(self) -> None:
        """Has survivors load what nobody holds any more; not what nobody has loaded yet.

        What does not fit into their memory waits for its holder to come back.
        """
        survivors = self._others_ready()
        lost = (self._lost_experts() & self._once_held) - self._covering
        shares = shared_out(self._model, self._settings, survivors, lost)
        for record in survivors:
            if shares[record.worker_id]:
                self._covering |= shares[record.worker_id]
                self._tasks.start(self._take_over(record, frozenset(shares[record.worker_id])))

    async def _take_over(self, record: WorkerRecord, experts: frozenset[ExpertId]) -> None:
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
        record.loading |= experts
        try:
            await self._or_death(record, self._fleet.load(record.worker_id, more))
        finally:
            record.loading -= experts
        if record.incarnation == life and record.state is not WorkerState.LOST:
            record.held |= experts
            self._touch()

    # Growing and shrinking

    async def _scale(self, num_workers: int) -> None:
        for record in [r for r in self.workers.values() if r.state is WorkerState.STOPPED]:
            del self.workers[record.worker_id]
        staying, leaving = split_workers(self.workers.values(), num_workers)
        check_shrink(self._model, self.workers.values(), leaving)
        new = [f"worker-{n}" for n in range(num_workers) if f"worker-{n}" not in self.workers]
        for worker_id in new:
            self._targets.pop(worker_id, None)
            self._hire(worker_id)
        try:
            await self._wait_for_processes(new)
            everybody = [*staying, *(self.workers[worker_id] for worker_id in new)]
            targets = planned_anew(self._model, self._settings, everybody)
        except (PlacementError, StartupError):
            self._dismiss_unplaced(new)
            raise
        self._targets, self.failure = targets, None
        self._placed.notify()
        await self._tasks.gather(self._become(r, targets[r.worker_id]) for r in staying)
        while any(self.workers[w].state is not WorkerState.READY for w in targets):
            await self.changed.wait()
        await self._tasks.gather(self._retire(record) for record in leaving)
        await self._trim(staying)

    async def _wait_for_processes(self, worker_ids: Sequence[str]) -> None:
        until_s = self._tasks.clock.now_s() + self._settings.start_timeout_s
        while missing := [w for w in worker_ids if self.workers[w].spawned is None]:
            left_s = until_s - self._tasks.clock.now_s()
            if left_s <= 0:
                waiting = "; ".join(f"{w} waits for {self._fleet.lack(w)}" for w in missing)
                raise StartupError(f"not within {self._settings.start_timeout_s:g} s: {waiting}")
            await self._tasks.wait_for(self.changed.wait(), left_s)

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
        missing = target.experts - record.held
        if record.state is WorkerState.READY and missing:
            try:
                await self._load_more(record, missing)
            except WorkerDiedError:
                # Its next life loads the new target as a whole.
                return

    async def _retire(self, record: WorkerRecord) -> None:
        """Lets a worker go without an error."""
        record.is_leaving = True
        if record.state is WorkerState.READY:
            await self._hand_over(record)
        del self.workers[record.worker_id]
        self._touch()
        await self._everybody_knows()
        if record.task is not None:
            record.task.cancel()
        await self._tell(record.worker_id, self._fleet.stop(record.worker_id))

    async def _trim(self, records: Sequence[WorkerRecord]) -> None:
        """Unloads what workers hold beyond their targets, after everybody knows not to ask them."""
        trimmed: list[WorkerRecord] = []
        for record in records:
            target = self._targets.get(record.worker_id)
            if record.state is not WorkerState.READY or target is None:
                continue
            record.shards = target
            surplus = record.held - target.experts
            # What nobody else has stays, whoever was meant to hold it.
            surplus -= surplus & self._only_held_by(record)
            if surplus:
                record.held -= surplus
                trimmed.append(record)
        if not trimmed:
            return
        self._touch()
        await self._everybody_knows()
        for record in trimmed:
            if record.state is WorkerState.READY:
                # What is being loaded meanwhile would else be dropped as soon as it is there.
                kept = record.held | record.loading
                told = self._fleet.unload(record.worker_id, kept)
                await self._tell(record.worker_id, told)

    def _only_held_by(self, record: WorkerRecord) -> frozenset[ExpertId]:
        return record.held.difference(*(r.held for r in self._others_ready(record)))

    def _others_ready(self, record: WorkerRecord | None = None) -> list[WorkerRecord]:
        ready = WorkerState.READY
        return [r for r in self.workers.values() if r.state is ready and r is not record]

    async def _drain(self, worker_id: str, restarts: bool) -> None:
        record = self.workers.get(worker_id)
        if record is None or record.state is not WorkerState.READY:
            raise PlacementError(f"{worker_id} is no worker that is ready")
        if not restarts:
            check_shrink(self._model, self.workers.values(), [record])
        others = self._others_ready(record)
        if not others:
            raise PlacementError(f"{worker_id} is the last worker that is ready")
        only_here = self._only_held_by(record)
        shares = shared_out(self._model, self._settings, others, only_here)
        if only_here.difference(*shares.values()):
            raise PlacementError(f"no other worker has memory for the experts of {worker_id}")
        await self._tasks.gather(
            self._load_more(r, frozenset(share)) for r in others if (share := shares[r.worker_id])
        )
        await self._hand_over(record)
        record.is_drained, record.is_leaving = True, not restarts
        await self._tell(worker_id, self._fleet.stop(worker_id))
        if not restarts:
            record.state = WorkerState.STOPPED
            self._note(record, "nothing: it was drained")
            self._touch()

    async def _hand_over(self, record: WorkerRecord) -> None:
        """Leaves a worker without work: no new requests, those it has move on, no calls."""
        record.state = WorkerState.DRAINING
        self._touch()
        await self._everybody_knows()
        await self._tell(record.worker_id, self._fleet.drain(record.worker_id))
        record.held = frozenset()
        self._touch()
        await self._everybody_knows()
