"""Makes a new view after each change, and gives it to everybody before anybody relies on it.

Routers get a view before workers raise their fences to it: no router is refused because it acts on
a view that is older than it can know.
"""

import logging
from dataclasses import replace

from milliways.cluster.control.state import ClusterState
from milliways.cluster.control.targets import attention_of
from milliways.runtime.tasks import Pending, Signal
from milliways.wire.view import EMPTY_VIEW, ClusterView, chains_of

logger = logging.getLogger(__name__)


class ViewPublisher:
    """Owns the view.

    Invariants: the view's `placement_epoch` only grows. `_published_epoch` is at most that; every
    worker that answers has the view of `_published_epoch`, or a newer one.
    """

    def __init__(self, state: ClusterState) -> None:
        self.view: ClusterView = EMPTY_VIEW
        self._state = state
        self._tasks = state.tasks
        self._is_outdated = False
        self._outdated = Signal()
        self._published_epoch = 0
        # Workers that did not answer when the view was sent to them last.
        self._unconfirmed: set[str] = set()
        # The newest view that each worker has confirmed.
        self._confirmed_epochs: dict[str, int] = {}

    @property
    def behind(self) -> tuple[str, ...]:
        """Workers that have not confirmed the newest view, in order."""
        alive = [m.worker_id for m in self.view.members.values() if m.can_compute]
        newest = self.view.placement_epoch
        return tuple(sorted(w for w in alive if self._confirmed_epochs.get(w, 0) < newest))

    def go_on_from(self, view: ClusterView) -> None:
        """Takes an earlier controller's view, which its workers have."""
        self.view = view
        self._published_epoch = view.placement_epoch

    def overtake(self, placement_epoch: int) -> None:
        """Moves the epoch beyond one that an earlier controller published, if it was higher."""
        if placement_epoch > self.view.placement_epoch:
            self.view = replace(self.view, placement_epoch=placement_epoch)
            self.touch()

    def touch(self) -> None:
        """Something changed that everybody has to know."""
        self._is_outdated = True
        self._outdated.notify()

    async def everybody_knows(self) -> None:
        """Waits until the newest view, with all changes so far, has been published."""
        while self._is_outdated or self._published_epoch < self.view.placement_epoch:
            await self._state.changed.wait()

    async def serve(self) -> None:
        """Publishes changes, for ever."""
        while True:
            if not self._is_outdated:
                await self._wait_for_change()
            if self._is_outdated:
                self._is_outdated = False
                self.view = self._make_view()
                self._state.figures.num_views += 1
                self._state.changed.notify()
            sending = self._tasks.start(self._send_to_everybody(self.view))
            await self._tasks.first_done((sending, self._outdated.wait()))
            if sending.is_done:
                self._published_epoch = self.view.placement_epoch
                self._state.changed.notify()
            # Otherwise there is a newer view: a worker that has not answered yet must not keep the
            # others from it.
            sending.cancel()

    async def confirmed(self, worker_id: str, answer: Pending[None]) -> bool:
        """Waits for a worker's answer, up to a timeout: a silent worker must not delay others."""
        has_answered = await self._tasks.wait_for(answer, self._state.settings.timeout_s)
        if not has_answered:
            logger.warning("%s does not answer", worker_id)
            self._unconfirmed.add(worker_id)
        return has_answered

    async def _wait_for_change(self) -> None:
        """Waits for a change, or until the view must be sent again to workers that were silent."""
        if self._unconfirmed:
            await self._tasks.wait_for(self._outdated.wait(), self._state.settings.timeout_s)
        else:
            await self._outdated.wait()

    def _make_view(self) -> ClusterView:
        workers = self._state.workers
        attention = {
            worker_id: attention_of(record.shards)
            for worker_id, record in workers.items()
            if record.shards is not None
        }
        view = ClusterView(
            placement_epoch=self.view.placement_epoch + 1,
            generation=self._state.generation,
            members={worker_id: record.member() for worker_id, record in workers.items()},
            manifest=self._state.manifest,
            manifest_is_whole=self._state.manifest_is_whole,
            model=self._state.model,
            chains=chains_of(attention, self._state.model.num_layers),
            declared=self._state.declared,
        )
        if view.manifest_is_whole or not view.routers() or self._state.lost_experts():
            return view
        # Every part has been loaded by somebody: from now on it is known what the model is.
        self._state.manifest_is_whole = True
        return replace(view, manifest_is_whole=True)

    async def _send_to_everybody(self, view: ClusterView) -> None:
        fleet, epoch = self._state.fleet, view.placement_epoch
        alive = [m.worker_id for m in view.members.values() if m.can_compute]
        self._unconfirmed = set()
        await self._tasks.gather(self._give(w, view) for w in alive)
        await self._tasks.gather(self.confirmed(w, fleet.fence(w, epoch)) for w in alive)

    async def _give(self, worker_id: str, view: ClusterView) -> None:
        answer = self._state.fleet.publish(worker_id, view)
        if await self.confirmed(worker_id, answer) and answer.error is None:
            self._confirmed_epochs[worker_id] = view.placement_epoch
