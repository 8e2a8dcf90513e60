"""The router's part in compiled steps: plans for them, and what to do when one cannot go on.

A compiled step runs in a thread of its own (`cluster.host.local_steps`). It sends rows to experts
and takes their outputs by itself, as the plan says. If something is not as planned, it stops and
waits. Then `look` finds out what is missing, and the `Dispatcher` decides, as it does for steps
that are not compiled: calls that are on their way are followed, others are asked again elsewhere.

Used in the router's thread; no clock, no socket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from milliways.router.dispatch import AskedCall, Dispatcher
from milliways.router.exchange_plan import Reach, plan_targets
from milliways.router.links.link_table import LinkTable
from milliways.runtime.tasks import Cancelled, Pending, Task, Tasks
from milliways.wire.calls import ExpertInput, ExpertOutputs, Refusal, Result
from milliways.wire.errors import PeerLostError, RefusalReason
from milliways.wire.exchange import CallState, ExchangeShape, Missing, RowsCall

# How often late answers are looked for that no step waits for any more.
LOOK_EVERY_S = 0.05


class Node(Protocol):
    """What a router uses of an `ExchangeNode`."""

    @property
    def shape(self) -> ExchangeShape: ...
    def set_plan(self, placement_epoch: int, targets_LE: np.ndarray) -> None: ...
    def set_patience(self, link: int, patience_s: float) -> None: ...
    def take_latency(self, link: int) -> tuple[float, int]: ...
    def missing(self) -> Missing | None: ...
    def call(self, number: int, index: int, num_places: int) -> RowsCall | None: ...
    def fill(self, number: int, places: np.ndarray, rows: np.ndarray) -> None: ...
    def resume(self, number: int) -> None: ...
    def give_up(self, batch: int) -> None: ...
    def is_unanswered(self, call: RowsCall) -> bool: ...


@dataclass(slots=True, eq=False)
class _Open:
    """A call that its worker has not answered, and what resolves when that is settled."""

    index: int
    call: RowsCall
    worker_id: str
    pending: Pending[Result]


@dataclass(slots=True, eq=False)
class _Batch:
    """The batch that is computed now. `failure` fails when its experts cannot be computed."""

    step: int
    batch_id: int
    caution_s: float | None
    failure: Pending[None] = field(default_factory=Pending[None])
    number: int = 0
    open_calls: list[_Open] = field(default_factory=list[_Open])
    completing: Task[None] | None = None


class StepExchange:
    """Owns the plan of a router's compiled steps, and the completing of layers.

    Invariant: at most one batch is current. Each call in `_late` was handed to the dispatcher,
    which still waits for it, although its layer has gone on.
    """

    def __init__(
        self, node: Node, links: LinkTable, dispatcher: Dispatcher, tasks: Tasks, dtype: np.dtype
    ) -> None:
        """`dtype` is that of activations."""
        self._node = node
        self._links = links
        self._dispatcher = dispatcher
        self._tasks = tasks
        self._dtype = dtype
        self._batch: _Batch | None = None
        self._planned: object = None
        # Each link of the plan, with its worker's id and incarnation.
        self._workers: dict[int, tuple[str, int]] = {}
        self._late: list[_Open] = []
        self._looking: Task[None] | None = None
        # Layers that had to wait for Python, since the start.
        self.num_completed = 0

    @property
    def is_cautious(self) -> bool:
        """Whether the current batch has rows of a suspect."""
        return self._batch is not None and self._batch.caution_s is not None

    def begin(self, step: int, batch_id: int, caution_s: float | None) -> Pending[None]:
        """A batch is about to be computed; the result fails if its experts cannot be computed."""
        self._take_latencies()
        self._forget_workers()
        self.plan()
        self._batch = _Batch(step, batch_id, caution_s)
        return self._batch.failure

    def end(self, batch_id: int, *, is_done: bool) -> None:
        """A batch was computed, or nobody needs it any more."""
        batch = self._batch
        if batch is None or batch.batch_id != batch_id:
            return
        self._batch = None
        if not is_done:
            self._node.give_up(batch_id)
        if batch.completing is not None:
            batch.completing.cancel()
        self._leave(batch)

    def plan(self) -> None:
        """Makes a new plan, if anything has changed that a plan depends on."""
        links, table = self._links.exchange_links(), self._links
        open_ids = frozenset(name for name in table.view.members if table.is_open(name))
        silent = frozenset(name for name in open_ids if table.is_silent(name))
        depends_on = (table.view.placement_epoch, table.view, links, open_ids, silent)
        for worker_id, link in links.items():
            self._node.set_patience(link, self._dispatcher.ask_again_after(worker_id)[0])
        if depends_on == self._planned:
            return
        self._planned = depends_on
        shape = self._node.shape
        far = frozenset(name for name in links if not table.shares_memory(name))
        reach = Reach(table.router_id, links, open_ids, silent, far)
        targets_LE = plan_targets(table.view, reach, shape.num_layers, shape.num_experts)
        incarnations = {name: table.incarnation_of(name) for name in links}
        self._workers |= {
            link: incarnation
            for name, link in links.items()
            if (incarnation := incarnations[name]) is not None
        }
        self._node.set_plan(table.view.placement_epoch, targets_LE)

    async def serve(self) -> None:
        """Keeps the plan up to date during long steps, for ever."""
        while True:
            await self._links.changed.wait()
            self.plan()

    def look(self) -> None:
        """Something is missing, or a call of a missing layer was settled."""
        missing = self._node.missing()
        if missing is None:
            return
        batch = self._batch
        if batch is None or missing.batch != batch.batch_id:
            self._node.give_up(missing.batch)
        elif missing.number != batch.number:
            self._leave(batch)
            batch.number = missing.number
            self._complete_soon(batch, missing)
        else:
            self._settle(batch, missing)

    def _complete_soon(self, batch: _Batch, missing: Missing) -> None:
        self.num_completed += 1
        # What was answered before a worker is late must not count as its first answer afterwards.
        self._take_latencies()
        # The links that broke meanwhile must not be in the plan of the next layer.
        self.plan()
        asked: list[AskedCall] = []
        for index in range(missing.num_calls):
            call = self._node.call(missing.number, index, len(missing.is_missing_N))
            if call is None or call.state is CallState.ANSWERED:
                continue
            worker_id, incarnation = self._workers[call.link]
            pending: Pending[Result] = Pending()
            hedge_after_s, timeout_s = self._dispatcher.ask_again_after(worker_id)
            self._links.follow(
                worker_id,
                call.link,
                pending,
                num_rows=len(call.places),
                waited_s=call.waited_s,
                late_after_s=hedge_after_s,
            )
            asked.append(
                AskedCall(
                    worker_id=worker_id,
                    incarnation=(worker_id, incarnation),
                    places=call.places,
                    pending=pending,
                    hedge_after_s=hedge_after_s,
                    timeout_s=timeout_s,
                    waited_s=call.waited_s,
                )
            )
            entry = _Open(index, call, worker_id, pending)
            if not self._take(entry, call):
                batch.open_calls.append(entry)
        batch.completing = self._tasks.start(self._complete(batch, missing, asked))

    async def _complete(self, batch: _Batch, missing: Missing, asked: Sequence[AskedCall]) -> None:
        rows_TD = missing.rows_TB.view(self._dtype)
        given = ExpertInput(missing.layer, rows_TD, missing.expert_ids_TA)
        try:
            outputs_ND = await self._dispatcher.complete(
                batch.step, given, missing.is_missing_N, asked, batch.caution_s
            )
        except Cancelled:
            raise
        except Exception as error:
            batch.failure.fail(error)
            return
        self._node.fill(missing.number, np.flatnonzero(missing.is_missing_N), outputs_ND)
        self._node.resume(missing.number)

    def _settle(self, batch: _Batch, missing: Missing) -> None:
        """Resolves the calls that were answered, refused or lost since."""
        still_open: list[_Open] = []
        for entry in batch.open_calls:
            call = self._node.call(missing.number, entry.index, len(missing.is_missing_N))
            if call is None or not self._take(entry, call):
                still_open.append(entry)
        batch.open_calls = still_open

    def _take(self, entry: _Open, call: RowsCall) -> bool:
        """Resolves a call with what became of it; False if it is still open."""
        match call.state:
            case CallState.OPEN:
                return False
            case CallState.LOST:
                entry.pending.fail(PeerLostError(entry.worker_id, "the connection broke"))
            case CallState.REFUSED:
                reason = _reason_of(call.status)
                message = f"at placement {call.placement_epoch}"
                entry.pending.resolve(Refusal(reason, message, call.placement_epoch))
            case CallState.ANSWERED:
                assert call.rows_NB is not None
                entry.pending.resolve(ExpertOutputs(call.rows_NB.view(self._dtype)))
        return True

    def _leave(self, batch: _Batch) -> None:
        """The layer has gone on: its open calls are watched until their workers answer."""
        self._late += batch.open_calls
        batch.open_calls = []
        if self._late and self._looking is None:
            self._looking = self._tasks.start(self._look_for_late())

    async def _look_for_late(self) -> None:
        """Until there are none. If a worker never answers, the table gives its link up."""
        while self._late:
            await self._tasks.sleep(LOOK_EVERY_S)
            links = self._links.exchange_links()
            still_late: list[_Open] = []
            for entry in self._late:
                if links.get(entry.worker_id) != entry.call.link:
                    entry.pending.fail(PeerLostError(entry.worker_id, "the connection broke"))
                elif self._node.is_unanswered(entry.call):
                    still_late.append(entry)
                else:
                    # What it says does not matter, only that it came.
                    entry.pending.resolve(Refusal(RefusalReason.EXPIRED, "it came too late"))
            self._late = still_late
        self._looking = None

    def _forget_workers(self) -> None:
        """Between two batches: links that are gone are in no layer that may still be reported."""
        open_links = set(self._links.exchange_links().values())
        self._workers = {n: worker for n, worker in self._workers.items() if n in open_links}

    def _take_latencies(self) -> None:
        for worker_id, link in self._links.exchange_links().items():
            longest_s, num_answers = self._node.take_latency(link)
            if num_answers:
                self._links.note_latency(worker_id, longest_s, num_answers)


def _reason_of(status: int) -> RefusalReason:
    try:
        return RefusalReason(status)
    except ValueError:
        # Of a newer worker, or nonsense: it must not end this router.
        return RefusalReason.FAULT
