"""Makes workers load more experts, and unload those that their targets do not include."""

from collections.abc import Sequence

from milliways.cluster.control.deaths import or_death
from milliways.cluster.control.fleet import WorkerDiedError
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

    async def load(self, record: WorkerRecord, plan: ShardPlan) -> None:
        """Makes a worker load shards of the model that is served, and no other bytes.

        The first worker that loads a part decides which bytes are the model's.

        Raises:
            WorkerDiedError: the worker died, or holds bytes of another model.
            LoadFailedError: it could not load a part. It keeps what it has loaded.
        """
        state = self._state
        peers = [other.member() for other in state.ready(besides=record)]
        loading = state.fleet.load(record.worker_id, plan, state.manifest, peers)
        loaded = await or_death(state, record, loading)
        found = loaded.manifest
        if differing := state.manifest.differing(found):
            # Another worker loaded these parts at the same time, and was the first to say so.
            others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise WorkerDiedError(
                f"{record.worker_id} read other bytes than other workers: {differing[0]}{others}"
            )
        state.manifest = state.manifest.with_all(found)
        state.small_files = loaded.small_files or state.small_files
        record.note_load(loaded.faults)

    async def load_more(self, record: WorkerRecord, experts: frozenset[ExpertId]) -> None:
        """Makes a ready worker load more experts.

        Raises:
            WorkerDiedError: the worker died.
            LoadFailedError: it could not load them.
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
            await self.load(record, more)
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
