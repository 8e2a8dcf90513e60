"""Makes workers load more experts, and unload those that their targets do not include."""

from collections.abc import Sequence

from milliways.cluster.control.deaths import or_death
from milliways.cluster.control.publishing import ViewPublisher
from milliways.cluster.control.state import ClusterState
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.view import WorkerState


class Holdings:
    """Changes what workers hold. An expert is promised only after it was loaded, and unloaded only
    after everybody knows that it is not promised any more.
    """

    def __init__(self, state: ClusterState, publisher: ViewPublisher) -> None:
        self._state = state
        self._publisher = publisher

    async def load_more(self, record: WorkerRecord, experts: frozenset[ExpertId]) -> None:
        """Makes a ready worker load more experts.

        Raises:
            WorkerDiedError: the worker died, or could not load them.
        """
        assert record.shards is not None
        incarnation = record.incarnation
        more = ShardPlan(
            first_layer=record.shards.first_layer,
            num_layers=record.shards.num_layers,
            has_ends=record.shards.has_ends,
            experts=record.held | experts,
        )
        record.loading |= experts
        try:
            await or_death(self._state, record, self._state.fleet.load(record.worker_id, more))
        finally:
            record.loading -= experts
        if record.incarnation == incarnation and record.state is not WorkerState.LOST:
            record.held |= experts
            self._publisher.touch()

    async def trim(self, records: Sequence[WorkerRecord]) -> None:
        """Unloads what ready workers hold beyond their targets."""
        trimmed: list[WorkerRecord] = []
        for record in records:
            target = self._state.targets.get(record.worker_id)
            if record.state is not WorkerState.READY or target is None:
                continue
            record.shards = target
            surplus = record.held - target.experts
            # Keep the last copy of an expert, even if the plan gives it to another worker.
            surplus -= surplus & self._state.only_held_by(record)
            if surplus:
                record.held -= surplus
                trimmed.append(record)
        if not trimmed:
            return
        self._publisher.touch()
        await self._publisher.everybody_knows()
        for record in trimmed:
            if record.state is WorkerState.READY:
                # Otherwise experts that are being loaded now would be unloaded at once.
                kept = record.held | record.loading
                answer = self._state.fleet.unload(record.worker_id, kept)
                await self._publisher.confirmed(record.worker_id, answer)
