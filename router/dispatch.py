"""Between the layers: sends each token to its experts and collects their outputs.

For one layer of one micro-batch:

1. Each wanted expert gets a replica: the one in this process, or the one with the fewest rows to
   answer.
2. Each chosen worker gets one message, with all the tokens that need its experts.
3. Outputs are put in the order of the gate's ranking, whatever order they arrive in. Outputs that
   are missing because a worker died, refused or is slow are asked of another worker; those that
   arrived are kept.
4. If nobody holds an expert, the layer is parked until a view or a new connection brings a replica.

Every expert is computed, and no sum is taken here: the attention shard combines. If worker after
worker dies with the same rows, they are not sent to the remaining workers (see `suspects`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from milliways.router.limits import DispatchLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.suspects import RowsKilledWorkersError
from milliways.runtime.tasks import Pending, Task, Tasks
from milliways.wire.calls import ExpertInput, ExpertOutputs, Refusal, Result, RunExperts
from milliways.wire.errors import PeerError, PeerLostError, RefusalReason, RefusedError
from milliways.wire.latency import patience_s
from milliways.wire.placement import ExpertId

BACK_OFF_S = 0.005
# A second worker is asked after this many times the first one's latency.
HEDGE_LATENCIES = 4.0
MAX_FAULTS = 3
# If this many workers died with the same rows, that is probably not a coincidence.
MAX_DEATHS = 2
# How long to wait for a view that confirms a death.
DEATH_CONFIRMED_WITHIN_S = 0.2


@dataclass(slots=True)
class _Layer:
    """One layer of a micro-batch while its outputs arrive.

    A place is the number of a token and one of its experts, in row-major order of [T, A].

    Invariant: `outputs_ND` has the output of each place that is not in `is_missing_N`; places
    without an expert are never in it.
    """

    step: int
    given: ExpertInput
    outputs_ND: np.ndarray
    is_missing_N: np.ndarray
    num_faults: int = 0
    # Workers whose connection broke while they had rows of it, each with its incarnation.
    broken: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    # Set for the rows of a suspect: how long to wait before an expert that was missing is asked.
    caution_s: float | None = None

    @property
    def max_deaths(self) -> int:
        """The number of deaths with these rows after which the rows are sent to no other worker."""
        return MAX_DEATHS if self.caution_s is None else 1

    def missing(self, places: np.ndarray) -> np.ndarray:
        """Those of the places that have no output yet, in the same order."""
        return places[self.is_missing_N[places]]


@dataclass(frozen=True, slots=True, eq=False)
class _Assignment:
    """Places that one worker is asked to fill; without a worker, places that wait for one."""

    worker_id: str | None
    places: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskedCall:
    """A call that a worker has got, and how long to wait before others are asked as well.

    `incarnation` is that of the connection over which it went, None if none was open.
    """

    worker_id: str
    incarnation: tuple[str, int] | None
    places: np.ndarray
    pending: Pending[Result]
    hedge_after_s: float
    timeout_s: float
    # Since it was sent.
    waited_s: float = 0.0


class Dispatcher:
    """Owns the choice of replicas, and the time limits for their answers."""

    def __init__(self, links: LinkTable, limits: DispatchLimits, tasks: Tasks) -> None:
        self._links = links
        self.limits = limits
        self._tasks = tasks
        self.num_resent = 0
        self.num_hedged = 0
        self.num_parked = 0
        self._num_parked_now = 0

    @property
    def is_parked(self) -> bool:
        """Whether a layer waits for experts that no worker holds."""
        return self._num_parked_now > 0

    async def run_experts(
        self, step: int, given: ExpertInput, caution_s: float | None = None
    ) -> np.ndarray:
        """Outputs [T, A, D] of a layer's experts, unweighted; zeros for an id of -1.

        `caution_s` is for the rows of a suspect: workers are asked one by one, and the first death
        ends the call. If no worker held an expert, the call waits another `caution_s` after a
        worker holds the expert again, because other layers waited for the same worker.

        Raises:
            RefusedError: workers failed to compute it MAX_FAULTS times.
            RowsKilledWorkersError: workers died of it.
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

    async def complete(
        self,
        step: int,
        given: ExpertInput,
        is_missing_N: np.ndarray,
        asked: Sequence[AskedCall],
        caution_s: float | None = None,
    ) -> np.ndarray:
        """Outputs [N, D] of the missing places of a layer, in order; other calls filled the rest.

        `asked` are calls to workers that have not filled their places: they may do so later, or
        have failed. Each is treated as if `run_experts` had sent it. `caution_s` and the errors are
        those of `run_experts`.
        """
        width = given.rows_TD.shape[1]
        wanted = np.flatnonzero(is_missing_N)
        layer = _Layer(
            step=step,
            given=given,
            outputs_ND=np.zeros((len(is_missing_N), width), given.rows_TD.dtype),
            is_missing_N=is_missing_N.copy(),
            caution_s=caution_s,
        )
        unasked = is_missing_N.copy()
        for call in asked:
            unasked[call.places] = False
        going_on = [self._go_on(layer, call) for call in asked]
        if unasked.any():
            going_on.append(self._fill(layer, np.flatnonzero(unasked), frozenset()))
        await self._tasks.gather(going_on)
        return layer.outputs_ND[wanted]

    def ask_again_after(self, worker_id: str) -> tuple[float, float]:
        """When others are asked as well, and when a worker is given up: seconds after asking it."""
        timeout_s = self.limits.timeout_s * self._links.slowness(worker_id)
        return self._hedge_after_s(worker_id), timeout_s

    async def _go_on(self, layer: _Layer, call: AskedCall) -> None:
        avoided = await self._follow(layer, call, frozenset())
        await self._fill(layer, call.places, avoided)

    async def _fill(self, layer: _Layer, places: np.ndarray, avoided: frozenset[str]) -> None:
        """Fills all of these places, each by a worker that is not avoided.

        It tries until they are filled, or the request is cancelled. Assignments are filled at the
        same time, and each is tried again alone.
        """
        while (places := layer.missing(places)).size:
            assignments = self._choose(layer, places, avoided)
            if len(assignments) > 1 and layer.caution_s is not None:
                for assignment in assignments:
                    # One after another, so that only one worker can die.
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
        """As `_fill`, with an assignment that was chosen before."""
        avoided = await self._try(layer, assignment, avoided)
        await self._fill(layer, assignment.places, avoided)

    def _choose(
        self, layer: _Layer, places: np.ndarray, avoided: frozenset[str]
    ) -> list[_Assignment]:
        """One assignment for each worker to ask, and one for places whose experts nobody holds."""
        ids = layer.given.expert_ids_TA.reshape(-1)[places]
        chosen: dict[str, list[np.ndarray]] = {}
        not_held: list[np.ndarray] = []
        planned: dict[str, int] = {}
        for expert in np.unique(ids):
            its_places = places[ids == expert]
            holders = self._links.holders(ExpertId(layer.given.layer, int(expert)))
            candidates = [worker for worker in holders if worker not in avoided]
            if not candidates:
                not_held.append(its_places)
                continue
            worker = min(candidates, key=lambda w: self._cost(w, planned.get(w, 0)))
            planned[worker] = planned.get(worker, 0) + len(its_places)
            chosen.setdefault(worker, []).append(its_places)
        # The worker of this process last: the others compute meanwhile.
        workers = sorted(chosen, key=lambda w: (self._links.is_local(w), w))
        assignments = [
            _Assignment(worker, np.sort(np.concatenate(chosen[worker]))) for worker in workers
        ]
        if not_held:
            assignments.append(_Assignment(None, np.sort(np.concatenate(not_held))))
        return assignments

    def _cost(self, worker_id: str, num_planned: int) -> tuple[bool, bool, int, str]:
        links = self._links
        num_rows = links.num_rows_out(worker_id) + num_planned
        return links.is_silent(worker_id), not links.is_local(worker_id), num_rows, worker_id

    def _hedge_after_s(self, worker_id: str) -> float:
        limits = self.limits
        return patience_s(
            self._links.latency_s(worker_id),
            multiple=HEDGE_LATENCIES,
            first_s=limits.hedge_after_s,
            least_s=limits.hedge_after_s_min,
            most_s=limits.hedge_after_s,
        )

    async def _try(
        self, layer: _Layer, assignment: _Assignment, avoided: frozenset[str]
    ) -> frozenset[str]:
        """Sends an assignment to its worker once.

        Returns the workers to avoid when the places that are still missing are sent again.
        """
        worker_id, places = assignment.worker_id, assignment.places
        if worker_id is None:
            await self._park()
            if layer.caution_s is not None:
                await self._tasks.sleep(layer.caution_s)
            return frozenset()
        incarnation = self._links.incarnation_of(worker_id)
        hedge_after_s, timeout_s = self.ask_again_after(worker_id)
        pending = self._links.ask(
            worker_id,
            _call(layer, places),
            step=layer.step,
            timeout_s=timeout_s,
            num_rows=len(places),
            late_after_s=hedge_after_s,
        )
        call = AskedCall(
            worker_id=worker_id,
            incarnation=incarnation,
            places=places,
            pending=pending,
            hedge_after_s=hedge_after_s,
            timeout_s=timeout_s,
        )
        return await self._follow(layer, call, avoided)

    async def _follow(
        self, layer: _Layer, call: AskedCall, avoided: frozenset[str]
    ) -> frozenset[str]:
        """Waits for a call that was sent, and asks others if it takes too long; as `_try`."""
        worker_id, places, pending = call.worker_id, call.places, call.pending
        incarnation, hedge_after_s = call.incarnation, call.hedge_after_s
        avoided |= {worker_id}
        try:
            wait_s = max(0.0, hedge_after_s - call.waited_s)
            is_done = pending.is_done or await self._tasks.wait_for(pending, wait_s)
            if not is_done:
                self._links.mark_late(worker_id)
                left_s = call.timeout_s - max(hedge_after_s, call.waited_s)
                assignment = _Assignment(worker_id, places)
                await self._hedge(layer, assignment, pending, avoided, left_s)
                if pending.is_done and pending.error is None and layer.missing(places).size:
                    self._links.hedged_too_early(worker_id, hedge_after_s)
        finally:
            if not pending.is_done:
                self._links.abandon(worker_id, pending, 2 * call.timeout_s)
        try:
            if pending.is_done:
                self._take(layer, worker_id, places, pending)
        except PeerError as error:
            num_missing = layer.missing(places).size
            if num_missing:
                self.num_resent += num_missing
                if isinstance(error, PeerLostError) and incarnation is not None:
                    layer.broken.add(incarnation)
                    await self._raise_if_deadly(layer)
                return await self._settle(layer, error, avoided)
        return avoided

    async def _raise_if_deadly(self, layer: _Layer) -> None:
        """Raises RowsKilledWorkersError if too many workers whose connection broke have died.

        A broken connection may be opened again soon. Only a view says that a process is gone.
        """
        until_s = self._tasks.clock.now_s() + DEATH_CONFIRMED_WITHIN_S
        while len(layer.broken) >= layer.max_deaths:
            dead = [lost for lost in layer.broken if self._links.has_ended(*lost)]
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
        """Asks other workers as well, if there are any. The first answer counts: bits are equal."""
        assert assignment.worker_id is not None
        time_is_up: Pending[None] = Pending()
        timer = self._tasks.call_later(max(0.0, left_s), lambda: time_is_up.resolve(None))
        asked: dict[str, Task[None]] = {}
        try:
            while (left := layer.missing(assignment.places)).size:
                if all(task.is_done for task in asked.values()):
                    # All calls are done and places are missing: the workers failed to compute them.
                    avoided |= asked.keys()
                    _raise_if_workers_died(asked.values())
                    asked = self._ask_others(layer, left, avoided)
                waits = [task for task in asked.values() if not task.is_done]
                await self._tasks.first_done(
                    (pending, time_is_up, self._links.changed.wait(), *waits)
                )
                if pending.is_done or time_is_up.is_done:
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
        """Puts outputs in their places; raises the error or refusal if there are none."""
        result = pending.result()
        if isinstance(result, Refusal):
            raise RefusedError(worker_id, result.reason, result.message)
        wanted = (len(places), layer.outputs_ND.shape[1])
        if not isinstance(result, ExpertOutputs) or result.rows_ND.shape != wanted:
            raise RefusedError(worker_id, RefusalReason.FAULT, f"outputs that are not {wanted}")
        layer.outputs_ND[places] = result.rows_ND
        layer.is_missing_N[places] = False

    async def _settle(
        self, layer: _Layer, error: PeerError, avoided: frozenset[str]
    ) -> frozenset[str]:
        """Waits before the next attempt, depending on the error; returns the workers to avoid."""
        reason = error.reason if isinstance(error, RefusedError) else None
        if reason in (RefusalReason.FAULT, RefusalReason.MALFORMED):
            layer.num_faults += 1
            if layer.num_faults >= MAX_FAULTS:
                raise error
        if reason in (RefusalReason.STALE_EPOCH, RefusalReason.STALE_INCARNATION):
            # A newer view is on its way. The wait is bounded in case it is lost.
            await self._tasks.wait_for(self._links.changed.wait(), 10 * BACK_OFF_S)
            return frozenset()
        if reason is RefusalReason.OVERLOADED:
            await self._tasks.sleep(BACK_OFF_S)
            return frozenset()
        return avoided

    async def _park(self) -> None:
        """Waits until a worker may hold the experts; after that no worker is avoided."""
        self.num_parked += 1
        self._num_parked_now += 1
        try:
            # Bounded, because a worker that was avoided may work again without a change of view.
            await self._tasks.wait_for(self._links.changed.wait(), self.limits.hedge_after_s)
        finally:
            self._num_parked_now -= 1


def _raise_if_workers_died(tasks: Iterable[Task[None]]) -> None:
    for task in tasks:
        if isinstance(task.error, RowsKilledWorkersError):
            raise task.error


def _call(layer: _Layer, places: np.ndarray) -> RunExperts:
    """A message with the tokens of these places, and only the experts of these places."""
    given = layer.given
    num_selected = given.expert_ids_TA.shape[1]
    rows, row_of_place = np.unique(places // num_selected, return_inverse=True)
    ids_TA = np.full((len(rows), num_selected), -1, np.int32)
    columns = places % num_selected
    ids_TA[row_of_place, columns] = given.expert_ids_TA[rows[row_of_place], columns]
    return RunExperts(given.layer, given.rows_TD[rows], ids_TA)
