"""Between the layers: sends each token to its experts, gathers what they make of it.

For one layer of one micro-batch:

1. Each wanted expert gets a replica: the one in this process, else the one with least to do.
2. One message goes to each worker, with all the tokens that need its experts.
3. Outputs are put where the gate's ranking has them, whatever order they arrive in. What is missing
   because a worker died, refused or is slow is asked of another; what arrived is kept.
4. An expert without a replica parks the layer until a view or a assignment brings one.

No expert is left out and no sum is taken here: the attention shard combines. Rows with which worker
after worker dies are not passed on to the rest (see `suspects`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from milliways.router.links.link_table import LinkTable
from milliways.router.suspects import RowsKilledWorkersError
from milliways.runtime.tasks import Pending, Task, Tasks
from milliways.wire.calls import ExpertInput, ExpertOutputs, Refusal, Result, RunExperts
from milliways.wire.errors import PeerError, PeerLostError, RefusalReason, RefusedError
from milliways.wire.placement import ExpertId

BACK_OFF_S = 0.005
HEDGE_LATENCIES = 4.0
MAX_FAULTS = 3
# So many workers that died with a layer's rows may be no chance. So long a view may take to tell.
MAX_DEATHS = 2
DEATH_TOLD_WITHIN_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """How long a worker may take.

    Another is asked as well after a multiple of the longest that the worker took of late (late
    answers left out, unless they were the first all the same), within
    `hedge_after_s_min` and `hedge_after_s`; after `timeout_s` it is given up.
    """

    hedge_after_s: float = 1.0
    hedge_after_s_min: float = 0.05
    timeout_s: float = 10.0


@dataclass(slots=True)
class _Layer:
    """One layer of a micro-batch while its outputs come in; places count T x A in row-major."""

    step: int
    given: ExpertInput
    outputs_ND: np.ndarray
    is_missing_N: np.ndarray
    num_faults: int = 0
    # Lives of workers whose assignment broke while they had rows of it.
    broken: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    caution_s: float | None = None

    @property
    def max_deaths(self) -> int:
        """How many workers it may cost before it is no longer passed on."""
        return MAX_DEATHS if self.caution_s is None else 1

    def missing(self, places: np.ndarray) -> np.ndarray:
        """Those of the places that have no output yet."""
        return places[self.is_missing_N[places]]


@dataclass(frozen=True, slots=True, eq=False)
class _Assignment:
    """Places that one worker is asked to fill; those without a worker wait for one."""

    worker_id: str | None
    places: np.ndarray


class Dispatcher:
    """Owns the choice of replicas, and the patience with them."""

    def __init__(self, links: LinkTable, limits: DispatchLimits, tasks: Tasks) -> None:
        self._links = links
        self._limits = limits
        self._tasks = tasks
        self.num_resent = 0
        self.num_hedged = 0
        self.num_parked = 0
        self._num_parked_now = 0

    @property
    def is_parked(self) -> bool:
        """Whether a layer waits for experts that nobody has."""
        return self._num_parked_now > 0

    async def run_experts(
        self, step: int, given: ExpertInput, caution_s: float | None = None
    ) -> np.ndarray:
        """Outputs [T, A, D] of a layer's experts, unweighted; zeros where the id is -1.

        `caution_s` is for rows of a suspect: workers are asked one by one, the first death ends it,
        and an expert that was waited for is asked so much later, since others waited for it too.

        Raises:
            RefusedError: workers fail to compute it, again and again.
            RowsKilledWorkersError: they die of it.
        """
        num_rows, num_selected = given.expert_ids_TA.shape
        width = given.rows_TD.shape[1]
        is_missing_N = (given.expert_ids_TA >= 0).reshape(-1)
        layer = _Layer(
            step=step,
            given=given,
            outputs_ND=np.zeros((num_rows * num_selected, width), given.rows_TD.dtype),
            is_missing_N=is_missing_N,
            caution_s=caution_s,
        )
        await self._fill(layer, np.flatnonzero(is_missing_N), frozenset())
        return layer.outputs_ND.reshape(num_rows, num_selected, width)

    async def _fill(self, layer: _Layer, places: np.ndarray, avoided: frozenset[str]) -> None:
        """Has all of these places filled, each by a worker that is not avoided.

        A loop, since failures may go on for as long as anybody waits. Places of different
        assignments are filled side by side, and fail one by one.
        """
        while (places := layer.missing(places)).size:
            assignments = self._choose(layer, places, avoided)
            if len(assignments) > 1 and layer.caution_s is not None:
                for assignment in assignments:
                    # One at a time, so that a death costs one worker.
                    await self._fill_by(layer, assignment, avoided)
                return
            if len(assignments) > 1:
                await self._tasks.gather(
                    self._fill_by(layer, assignment, avoided) for assignment in assignments
                )
                return
            avoided = await self._try(layer, assignments[0], avoided)

    async def _fill_by(
        self, layer: _Layer, assignment: _Assignment, avoided: frozenset[str]
    ) -> None:
        """As `_fill`, by an assignment that is chosen already."""
        avoided = await self._try(layer, assignment, avoided)
        await self._fill(layer, assignment.places, avoided)

    def _choose(
        self, layer: _Layer, places: np.ndarray, avoided: frozenset[str]
    ) -> Sequence[_Assignment]:
        """One assignment per worker to ask, and one for the places whose experts nobody has."""
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
        # Those of this process last: the others compute meanwhile.
        workers = sorted(chosen, key=lambda w: (self._links.is_local(w), w))
        assignments = [
            _Assignment(worker, np.sort(np.concatenate(chosen[worker]))) for worker in workers
        ]
        if homeless:
            assignments.append(_Assignment(None, np.sort(np.concatenate(homeless))))
        return assignments

    def _cost(self, worker_id: str, num_planned: int) -> tuple[bool, bool, int, str]:
        links = self._links
        num_rows = links.num_rows_out(worker_id) + num_planned
        return links.is_silent(worker_id), not links.is_local(worker_id), num_rows, worker_id

    def _hedge_after_s(self, worker_id: str) -> float:
        latency_s = self._links.latency_s(worker_id)
        if latency_s is None:
            return self._limits.hedge_after_s
        wanted_s = max(self._limits.hedge_after_s_min, HEDGE_LATENCIES * latency_s)
        return min(wanted_s, self._limits.hedge_after_s)

    async def _try(
        self, layer: _Layer, assignment: _Assignment, avoided: frozenset[str]
    ) -> frozenset[str]:
        """Asks the worker of an assignment once; whom to avoid for what is missing after that."""
        if assignment.worker_id is None:
            await self._park()
            if layer.caution_s is not None:
                await self._tasks.sleep(layer.caution_s)
            return frozenset()
        life = self._links.incarnation_of(assignment.worker_id)
        timeout_s = self._limits.timeout_s * self._links.slowness(assignment.worker_id)
        hedge_after_s = self._hedge_after_s(assignment.worker_id)
        pending = self._links.ask(
            assignment.worker_id,
            _call(layer, assignment.places),
            step=layer.step,
            timeout_s=timeout_s,
            num_rows=len(assignment.places),
            late_after_s=hedge_after_s,
        )
        avoided |= {assignment.worker_id}
        try:
            is_done = pending.is_done or await self._tasks.wait_for(pending, hedge_after_s)
            if not is_done:
                self._links.mark_late(assignment.worker_id)
                left_s = timeout_s - hedge_after_s
                await self._hedge(layer, assignment, pending, avoided, left_s)
                if (
                    pending.is_done
                    and pending.error is None
                    and layer.missing(assignment.places).size
                ):
                    self._links.hedged_too_early(assignment.worker_id, hedge_after_s)
        finally:
            if not pending.is_done:
                self._links.abandon(assignment.worker_id, pending, 2 * timeout_s)
        try:
            if pending.is_done:
                self._take(layer, assignment.worker_id, assignment.places, pending)
        except PeerError as error:
            num_missing = layer.missing(assignment.places).size
            if num_missing:
                self.num_resent += num_missing
                if isinstance(error, PeerLostError) and life is not None:
                    layer.broken.add(life)
                    await self._judge(layer)
                return await self._settle(layer, error, avoided)
        return avoided

    async def _judge(self, layer: _Layer) -> None:
        """Raises RowsKilledWorkersError where too many did, of those whose assignment broke.

        A stream that broke may stand again soon; that a process is gone, a view tells.
        """
        until_s = self._tasks.clock.now_s() + DEATH_TOLD_WITHIN_S
        while len(layer.broken) >= layer.max_deaths:
            dead = [life for life in layer.broken if self._links.has_ended(*life)]
            if len(dead) >= layer.max_deaths:
                raise RowsKilledWorkersError(sorted(worker_id for worker_id, _ in dead))
            left_s = until_s - self._tasks.clock.now_s()
            if left_s <= 0:
                return
            await self._tasks.wait_for(self._links.changed.wait(), left_s)

    async def _hedge(
        self,
        layer: _Layer,
        assignment: _Assignment,
        pending: Pending[Result],
        avoided: frozenset[str],
        left_s: float,
    ) -> None:
        """Asks others as well, where there are any; who answers first is taken: equal bits."""
        assert assignment.worker_id is not None
        patience: Pending[None] = Pending()
        timer = self._tasks.call_later(max(0.0, left_s), lambda: patience.resolve(None))
        asked: dict[str, Task[None]] = {}
        try:
            while (left := layer.missing(assignment.places)).size:
                if all(task.is_done for task in asked.values()):
                    # What is missing although they are done, they failed to compute.
                    avoided |= asked.keys()
                    _raise_if_workers_died(asked.values())
                    asked = self._ask_others(layer, left, avoided)
                waits = [task for task in asked.values() if not task.is_done]
                await self._tasks.first_done(
                    (pending, patience, self._links.changed.wait(), *waits)
                )
                if pending.is_done or patience.is_done:
                    break
        finally:
            timer.cancel()
            for task in asked.values():
                task.cancel()
        if not pending.is_done and layer.missing(assignment.places).size:
            self._links.give_up(assignment.worker_id)

    def _ask_others(
        self, layer: _Layer, places: np.ndarray, avoided: frozenset[str]
    ) -> dict[str, Task[None]]:
        assignments = self._choose(layer, places, avoided)
        asked = {
            assignment.worker_id: self._tasks.start(self._fill_by(layer, assignment, avoided))
            for assignment in assignments
            if assignment.worker_id is not None
        }
        self.num_hedged += len(asked)
        return asked

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

    async def _settle(
        self, layer: _Layer, error: PeerError, avoided: frozenset[str]
    ) -> frozenset[str]:
        """Waits as long as makes sense after an error; whom to avoid next."""
        reason = error.reason if isinstance(error, RefusedError) else None
        if reason in (RefusalReason.FAULT, RefusalReason.MALFORMED):
            layer.num_faults += 1
            if layer.num_faults >= MAX_FAULTS:
                raise error
        if reason in (RefusalReason.STALE_EPOCH, RefusalReason.STALE_INCARNATION):
            # A newer view is on its assignment; waiting for it is bounded, should it be lost.
            await self._tasks.wait_for(self._links.changed.wait(), 10 * BACK_OFF_S)
            return frozenset()
        if reason is RefusalReason.OVERLOADED:
            await self._tasks.sleep(BACK_OFF_S)
            return frozenset()
        return avoided

    async def _park(self) -> None:
        """Waits for somebody to have the experts; whoever was avoided may then be asked again."""
        self.num_parked += 1
        self._num_parked_now += 1
        try:
            # Bounded, because a worker that was avoided may have come to its senses unseen.
            await self._tasks.wait_for(self._links.changed.wait(), self._limits.hedge_after_s)
        finally:
            self._num_parked_now -= 1


def _raise_if_workers_died(tasks: Iterable[Task[None]]) -> None:
    for task in tasks:
        if isinstance(task.error, RowsKilledWorkersError):
            raise task.error


def _call(layer: _Layer, places: np.ndarray) -> RunExperts:
    """A message with the tokens of these places, and no expert that is not of them."""
    given = layer.given
    num_selected = given.expert_ids_TA.shape[1]
    rows, row_of_place = np.unique(places // num_selected, return_inverse=True)
    ids_TA = np.full((len(rows), num_selected), -1, np.int32)
    columns = places % num_selected
    ids_TA[row_of_place, columns] = given.expert_ids_TA[rows[row_of_place], columns]
    return RunExperts(given.layer, given.rows_TD[rows], ids_TA)
