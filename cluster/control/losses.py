"""When the last holder of an expert died: others take the expert over."""

import logging
from collections.abc import Sequence

from milliways.cluster.control.deaths import reload_delay_s
from milliways.cluster.control.fleet import LoadFailedError, WorkerDiedError
from milliways.cluster.control.holdings import Holdings
from milliways.cluster.control.state import ClusterState
from milliways.cluster.control.targets import shared_out
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.placement import ExpertId
from milliways.wire.view import WorkerState

logger = logging.getLogger(__name__)


class Losses:
    """Makes survivors load experts that nobody holds.

    Invariant: `_taken_over` has the experts that some survivor is loading for this reason.
    """

    def __init__(self, state: ClusterState, holdings: Holdings) -> None:
        self._state = state
        self._holdings = holdings
        self._taken_over: set[ExpertId] = set()

    def make_good(self) -> None:
        """Starts to load experts that a worker held when it died, if nobody holds them now.

        Experts that do not fit into the survivors' memory come back when their holder restarts.
        """
        state, survivors = self._state, self._state.ready()
        lost = (state.lost_experts() & state.once_held) - self._taken_over
        if not lost and not self._taken_over:
            self._forget_failures(survivors)
        shares = shared_out(state.model, state.settings, survivors, lost)
        for record in survivors:
            if shares[record.worker_id]:
                self._taken_over |= shares[record.worker_id]
                state.tasks.start(self._take_over(record, frozenset(shares[record.worker_id])))

    def _forget_failures(self, survivors: Sequence[WorkerRecord]) -> None:
        """What some worker could not load has been loaded, perhaps by another one."""
        for record in survivors:
            if record.num_failed_loads:
                record.note_load()
                self._state.note(record, "")

    async def _take_over(self, record: WorkerRecord, experts: frozenset[ExpertId]) -> None:
        state = self._state
        state.figures.num_take_overs += 1
        is_alive = True
        try:
            await self._holdings.load_more(record, experts)
            state.note(record, "")
        except LoadFailedError as error:
            record.note_failed_load(error)
            await self._pause(record)
        except WorkerDiedError as error:
            is_alive = False
            logger.warning("%s could not take over experts: %s", record.worker_id, error)
        finally:
            self._taken_over -= experts
        if is_alive or record.state is not WorkerState.READY:
            # What is still lost is tried again, by those that are ready now. The death of a worker
            # that is still READY here is about to be noted, which does the same.
            self.make_good()

    async def _pause(self, record: WorkerRecord) -> None:
        """Waits before experts that could not be loaded are tried again."""
        state = self._state
        delay_s = reload_delay_s(record.num_failed_loads)
        if record.state is WorkerState.READY:
            state.note(record, f"its next try to take experts over, in {delay_s:g} s")
        await state.tasks.sleep(delay_s)
