"""Between the layers: sends each token to its experts, gathers what they make of it.

For one layer of one micro-batch:

1. Each wanted expert gets a replica: the one in this process, else the one with least to do.
2. One message goes to each worker, with all the tokens that need its experts.
3. Outputs are put where the gate's ranking has them, whatever order they arrive in. What is missing
   because a worker died, refused or is slow is asked of another; what arrived is kept.
4. An expert without a replica parks the layer until a view or a way brings one.

No expert is left out and no sum is taken here: the attention shard combines.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster.calls import ExpertInput, ExpertOutputs, Refusal, Result, RunExperts
from cluster.errors import PeerError, RefusalReason, RefusedError
from cluster.placement import ExpertId
from cluster.tasks import Pending, Task, Tasks
from router.link_table import LinkTable

BACK_OFF_S = 0.005
MAX_FAULTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """How long a worker may take. `hedge_after_s` asks another as well, `timeout_s` gives it up."""

    hedge_after_s: float = 1.0
    timeout_s: float = 10.0


@dataclass(slots=True)
class _Layer:
    """One layer of a micro-batch while its outputs come in; places count T x A in row-major."""

    step: int
    given: ExpertInput
    outputs_ND: np.ndarray
    is_missing_N: np.ndarray
    timeout_s: float
    num_faults: int = 0

    def missing(self, places: np.ndarray) -> np.ndarray:
        """Those of the places that have no output yet."""
        return places[self.is_missing_N[places]]


class Dispatcher:
    """Owns the choice of replicas, and the patience with them."""

    def __init__(self, links: LinkTable, limits: DispatchLimits, tasks: Tasks) -> None:
        self._links = links
        self._limits = limits
        self._tasks = tasks
        self.num_resent = 0
        self.num_hedged = 0
        self.num_parked = 0

    def figures(self) -> dict[str, int]:
        """Counts since the start, for status and metrics."""
        return {
            "resent_rows": self.num_resent,
            "hedged_calls": self.num_hedged,
            "parked": self.num_parked,
        }

    async def run_experts(self, step: int, given: ExpertInput) -> np.ndarray:
        """Outputs [T, A, D] of a layer's experts, unweighted; zeros where the id is -1.

        Raises:
            RefusedError: workers fail to compute it, again and again.
        """
        num_rows, num_selected = given.expert_ids_TA.shape
        width = given.rows_TD.shape[1]
        is_missing_N = (given.expert_ids_TA >= 0).reshape(-1)
        layer = _Layer(
            step=step,
            given=given,
            outputs_ND=np.zeros((num_rows * num_selected, width), given.rows_TD.dtype),
            is_missing_N=is_missing_N,
            timeout_s=self._limits.timeout_s,
        )
        await self._gather(layer, np.flatnonzero(is_missing_N), frozenset())
        return layer.outputs_ND.reshape(num_rows, num_selected, width)

    async def _gather(self, layer: _Layer, places: np.ndarray, avoided: frozenset[str]) -> None:
        """Has all of these places filled, each by a worker that is not avoided."""
        places_by_worker, homeless = self._choose(layer, places, avoided)
        # Those of this process last: the others compute meanwhile.
        workers = sorted(places_by_worker, key=lambda w: (self._links.is_local(w), w))
        waits = [self._ask(layer, worker, places_by_worker[worker], avoided) for worker in workers]
        if homeless.size:
            waits.append(self._park(layer, homeless))
        if len(waits) == 1:
            await waits[0]
        else:
            await self._tasks.gather(waits)

    def _choose(
        self, layer: _Layer, places: np.ndarray, avoided: frozenset[str]
    ) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """The places for each worker, and those whose experts nobody has."""
        ids = layer.given.expert_ids_TA.reshape(-1)[places]
        chosen: dict[str, list[np.ndarray]] = {}
        homeless: list[np.ndarray] = []
        planned: dict[str, int] = {}
        for expert in np.unique(ids):
            its_places = places[ids == expert]
            holders = self._links.holders(ExpertId(layer.given.layer, int(expert)))
            candidates = [worker for worker in holders if worker not in avoided]
            if not candidates:
                homeless.append(its_places)
                continue
            worker = min(candidates, key=lambda w: self._cost(w, planned.get(w, 0)))
            planned[worker] = planned.get(worker, 0) + len(its_places)
            chosen.setdefault(worker, []).append(its_places)
        return (
            {worker: np.sort(np.concatenate(parts)) for worker, parts in chosen.items()},
            np.sort(np.concatenate(homeless)) if homeless else np.empty(0, np.intp),
        )

    def _cost(self, worker_id: str, num_planned: int) -> tuple[bool, int, str]:
        num_rows = self._links.num_rows_out(worker_id) + num_planned
        return not self._links.is_local(worker_id), num_rows, worker_id

    async def _ask(
        self, layer: _Layer, worker_id: str, places: np.ndarray, avoided: frozenset[str]
    ) -> None:
        pending = self._links.ask(
            worker_id,
            _call(layer, places),
            step=layer.step,
            timeout_s=layer.timeout_s,
            num_rows=len(places),
        )
        avoided |= {worker_id}
        is_done = pending.is_done or await self._tasks.wait_for(pending, self._limits.hedge_after_s)
        if is_done:
            await self._finish(layer, worker_id, places, pending, avoided)
        else:
            await self._hedge(layer, worker_id, pending, places, avoided)

    async def _hedge(
        self,
        layer: _Layer,
        worker_id: str,
        pending: Pending[Result],
        places: np.ndarray,
        avoided: frozenset[str],
    ) -> None:
        """Asks others as well, where there are any; who answers first is taken: equal bits."""
        patience: Pending[None] = Pending()
        left_s = layer.timeout_s - self._limits.hedge_after_s
        timer = self._tasks.call_later(max(0.0, left_s), lambda: patience.resolve(None))
        asked: list[Task[None]] = []
        try:
            while (left := layer.missing(places)).size:
                if all(task.is_done for task in asked):
                    others, _ = self._choose(layer, left, avoided)
                    self.num_hedged += len(others)
                    asked = [
                        self._tasks.start(self._ask(layer, other, its_places, avoided))
                        for other, its_places in others.items()
                    ]
                waits = [task for task in asked if not task.is_done]
                await self._tasks.first_done(
                    (pending, patience, self._links.changed.wait(), *waits)
                )
                if pending.is_done or patience.is_done:
                    break
        finally:
            timer.cancel()
            for task in asked:
                task.cancel()
        if not pending.is_done and layer.missing(places).size:
            # Twice as long next time: who is slow but alive must not be given up for ever.
            layer.timeout_s *= 2
            self._links.give_up(worker_id)
        if pending.is_done:
            await self._finish(layer, worker_id, places, pending, avoided)

    async def _finish(
        self,
        layer: _Layer,
        worker_id: str,
        places: np.ndarray,
        pending: Pending[Result],
        avoided: frozenset[str],
    ) -> None:
        """Takes an answer, or asks another for what it does not bring."""
        try:
            self._take(layer, worker_id, places, pending)
        except PeerError as error:
            left = layer.missing(places)
            if left.size:
                await self._ask_again(layer, left, avoided, error)

    def _take(
        self, layer: _Layer, worker_id: str, places: np.ndarray, pending: Pending[Result]
    ) -> None:
        """Puts outputs in their places; raises what came instead."""
        result = pending.result()
        if isinstance(result, Refusal):
            raise RefusedError(worker_id, result.reason, result.message)
        wanted = (len(places), layer.outputs_ND.shape[1])
        if not isinstance(result, ExpertOutputs) or result.rows_ND.shape != wanted:
            raise RefusedError(worker_id, RefusalReason.FAULT, "outputs of another shape")
        layer.outputs_ND[places] = result.rows_ND
        layer.is_missing_N[places] = False

    async def _ask_again(
        self, layer: _Layer, places: np.ndarray, avoided: frozenset[str], error: PeerError
    ) -> None:
        self.num_resent += len(places)
        reason = error.reason if isinstance(error, RefusedError) else None
        if reason in (RefusalReason.FAULT, RefusalReason.MALFORMED):
            layer.num_faults += 1
            if layer.num_faults >= MAX_FAULTS:
                raise error
        if reason in (RefusalReason.STALE_EPOCH, RefusalReason.STALE_INCARNATION):
            # A newer view is on its way; waiting for it is bounded, should it be lost.
            await self._tasks.wait_for(self._links.changed.wait(), 10 * BACK_OFF_S)
            avoided = frozenset()
        if reason is RefusalReason.OVERLOADED:
            await self._tasks.sleep(BACK_OFF_S)
            avoided = frozenset()
        await self._gather(layer, places, avoided)

    async def _park(self, layer: _Layer, places: np.ndarray) -> None:
        """Waits for somebody to have the experts; whoever was avoided may then be asked again."""
        self.num_parked += 1
        # Bounded, because a worker that was avoided may have come to its senses unseen.
        await self._tasks.wait_for(self._links.changed.wait(), self._limits.hedge_after_s)
        await self._gather(layer, places, frozenset())


def _call(layer: _Layer, places: np.ndarray) -> RunExperts:
    """A message with the tokens of these places, and no expert that is not of them."""
    given = layer.given
    num_selected = given.expert_ids_TA.shape[1]
    rows, row_of_place = np.unique(places // num_selected, return_inverse=True)
    ids_TA = np.full((len(rows), num_selected), -1, np.int32)
    columns = places % num_selected
    ids_TA[row_of_place, columns] = given.expert_ids_TA[rows[row_of_place], columns]
    return RunExperts(given.layer, given.rows_TD[rows], ids_TA)
