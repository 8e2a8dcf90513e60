"""When the last holder of an expert died: others take the expert over."""

import logging

from milliways.cluster.control.fleet import WorkerDiedError
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
        shares = shared_out(state.model, state.settings, survivors, lost)
        for record in survivors:
            if shares[record.worker_id]:
                self._taken_over |= shares[record.worker_id]
                state.tasks.start(self._take_over(record, frozenset(shares[record.worker_id])))

    async def _take_over(self, record: WorkerRecord, experts: frozenset[ExpertId]) -> None:
        self._state.figures.num_take_overs += 1
        try:
            await self._holdings.load_more(record, experts)
        except WorkerDiedError as error:
            logger.warning("%s could not take over experts: %s", record.worker_id, error)
        finally:
            self._taken_over -= experts
        if record.state is not WorkerState.READY:
            self.make_good()
