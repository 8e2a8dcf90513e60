"""Compiled steps that cannot go on: what the router does with their missing places."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from milliways.router.dispatch import MAX_FAULTS, Dispatcher
from milliways.router.exchange_plan import Reach, plan_targets
from milliways.router.limits import DispatchLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.step_exchange import LOOK_EVERY_S, StepExchange
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.calls import Call, ExpertOutputs, Fence, Refusal, Result, RunExperts
from milliways.wire.errors import PeerLostError, RefusalReason, RefusedError
from milliways.wire.exchange import (
    BY_PYTHON,
    HERE,
    CallState,
    ExchangeShape,
    Missing,
    RowsCall,
)
from milliways.wire.links import WorkerLink
from milliways.wire.placement import ExpertId
from milliways.wire.view import ClusterView, Member, WorkerState

WIDTH, NUM_EXPERTS, LAYER = 4, 4, 1
SHAPE = ExchangeShape(
    num_layers=2, num_experts=NUM_EXPERTS, num_selected=2, width=WIDTH, item_bytes=4
)
LIMITS = DispatchLimits(hedge_after_s=1.0, hedge_after_s_min=0.05, timeout_s=10.0)
ROWS_TD = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
# The router's own worker has experts 0 and 1; `a` and `b` both have 2 and 3.
IDS_TA = np.array([[0, 2], [3, 1]], np.int32)
FAR_PLACES = np.array([1, 2])


def member(name: str, experts: range, incarnation: int = 1) -> Member:
    return Member(
        worker_id=name,
        incarnation=incarnation,
        address="",
        state=WorkerState.READY,
        experts=frozenset(ExpertId(layer, e) for layer in range(2) for e in experts),
    )


def view(epoch: int, *members: Member) -> ClusterView:
    return ClusterView(placement_epoch=epoch, members={m.worker_id: m for m in members})


OWN, A, B = member("own", range(2)), member("a", range(2, 4)), member("b", range(2, 4))


class FakeLink:
    transport = "fake"

    def __init__(self, name: str, exchange_link: int) -> None:
        self.is_local = name == "own"
        self.exchange_link = exchange_link
        self.asked: list[tuple[RunExperts, Pending[Result]]] = []
        self.is_closed = False

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        assert isinstance(call, RunExperts)
        self.asked.append((call, Pending()))
        return self.asked[-1][1]

    def close(self) -> None:
        self.is_closed = True
        for _, pending in self.asked:
            pending.fail(PeerLostError("", "closed"))


@dataclass(slots=True)
class FakeNode:
    """A node whose missing layer and calls the test sets."""

    shape: ExchangeShape = SHAPE
    plans: list[tuple[int, list[int]]] = field(default_factory=list[tuple[int, list[int]]])
    patience: dict[int, float] = field(default_factory=dict[int, float])
    calls: list[RowsCall] = field(default_factory=list[RowsCall])
    now_missing: Missing | None = None
    filled: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    resumed: list[int] = field(default_factory=list[int])
    given_up: list[int] = field(default_factory=list[int])
    unanswered: bool = True
    # By link, since they were taken last.
    num_answers: dict[int, int] = field(default_factory=lambda: {1: 3, 2: 3})

    def set_plan(self, placement_epoch: int, targets_LE: np.ndarray) -> None:
        self.plans.append((placement_epoch, targets_LE[LAYER].tolist()))

    def set_patience(self, link: int, patience_s: float) -> None:
        self.patience[link] = patience_s

    def take_latency(self, link: int) -> tuple[float, int]:
        return 0.01, self.num_answers.pop(link, 0)

    def missing(self) -> Missing | None:
        return self.now_missing

    def call(self, number: int, index: int, num_places: int) -> RowsCall | None:
        return self.calls[index]

    def fill(self, number: int, places: np.ndarray, rows: np.ndarray) -> None:
        self.filled |= dict(zip(places.tolist(), rows.tolist(), strict=True))

    def resume(self, number: int) -> None:
        self.resumed.append(number)

    def give_up(self, batch: int) -> None:
        self.given_up.append(batch)

    def is_unanswered(self, call: RowsCall) -> bool:
        return self.unanswered


class Bench:
    """A router with links to its own worker, `a` (ring 1) and `b` (ring 2)."""

    def __init__(self, *members: Member) -> None:
        self.clock = FakeClock()
        self.tasks = Tasks(self.clock)
        self.links: dict[str, FakeLink] = {}
        self.num_opened = 0
        self.table = LinkTable("own", 1, self._connect, self.tasks)
        self.dispatcher = Dispatcher(self.table, LIMITS, self.tasks)
        self.node = FakeNode()
        self.exchange = StepExchange(
            self.node, self.table, self.dispatcher, self.tasks, np.dtype(np.float32)
        )
        self.table.update(view(1, *members))
        self.tasks.run_ready()
        self.failure = self.exchange.begin(step=1, batch_id=5, caution_s=None)

    def _connect(self, member: Member) -> Pending[WorkerLink]:
        opened: Pending[WorkerLink] = Pending()
        # The first links are numbered 1 and 2; one that is opened again has a new number.
        self.num_opened += member.worker_id != "own"
        number = 0 if member.worker_id == "own" else self.num_opened
        self.links[member.worker_id] = FakeLink(member.worker_id, number)
        opened.resolve(self.links[member.worker_id])
        return opened

    def stop(self, *calls: RowsCall, batch: int = 5, number: int = 1) -> None:
        """The step reports a layer, of which only the own experts' places are filled."""
        self.node.calls = list(calls)
        self.node.now_missing = Missing(
            number=number,
            batch=batch,
            layer=LAYER,
            rows_TB=ROWS_TD.view(np.uint8),
            expert_ids_TA=IDS_TA,
            is_missing_N=np.isin(np.arange(4), FAR_PLACES),
            num_calls=len(calls),
        )
        self.look()

    def look(self) -> None:
        self.exchange.look()
        self.tasks.run_ready()

    def advance(self, seconds: float) -> None:
        self.clock.advance_to(self.clock.now_s() + seconds)
        self.tasks.run_ready()

    def answer(self, name: str) -> None:
        call, pending = self.links[name].asked[-1]
        pending.resolve(ExpertOutputs(outputs_of(call)))
        self.tasks.run_ready()

    @property
    def is_whole(self) -> bool:
        return self.node.resumed == [1] and sorted(self.node.filled) == FAR_PLACES.tolist()


def outputs_of(call: RunExperts) -> np.ndarray:
    rows, columns = np.nonzero(call.expert_ids_TA >= 0)
    ids_N = call.expert_ids_TA[rows, columns]
    return call.rows_TD[rows] * 10 + ids_N[:, None].astype(np.float32)


def expected(place: int) -> list[float]:
    return (ROWS_TD[place // 2] * 10 + IDS_TA.reshape(-1)[place]).tolist()


def call_to(link: int, state: CallState, *, status: int = 0, waited_s: float = 0.0) -> RowsCall:
    rows_ND = np.array([expected(place) for place in FAR_PLACES], np.float32)
    return RowsCall(
        link=link,
        slot=0,
        sequence=1,
        state=state,
        status=status,
        placement_epoch=1,
        waited_s=waited_s,
        places=FAR_PLACES,
        rows_NB=rows_ND.view(np.uint8) if state is CallState.ANSWERED else None,
    )


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(OWN, A, B)
    yield made
    made.exchange.end(5, is_done=False)
    made.table.close()
    made.tasks.run_ready()
    made.tasks.close()


def test_plan_prefers_the_own_worker_and_shares_out_the_rest(bench: Bench) -> None:
    # Two layers, each with two experts elsewhere: each of the two other workers gets half.
    epoch, targets = bench.node.plans[-1]
    assert (epoch, targets) == (1, [HERE, HERE, 1, 2])
    assert set(bench.node.patience) == {1, 2}


def test_plan_is_made_again_only_if_something_changed(bench: Bench) -> None:
    bench.exchange.plan()
    assert len(bench.node.plans) == 1
    bench.table.mark_late("b")
    bench.exchange.plan()
    assert bench.node.plans[-1] == (1, [HERE, HERE, 1, 1])
    bench.table.update(view(2, OWN, B))
    bench.exchange.plan()
    assert bench.node.plans[-1] == (2, [HERE, HERE, 2, 2])
    bench.table.update(view(3, OWN))
    bench.exchange.plan()
    assert bench.node.plans[-1] == (3, [HERE, HERE, BY_PYTHON, BY_PYTHON])


def test_plan_leaves_workers_without_a_ring_to_python() -> None:
    reach = Reach("own", {"a": 1}, {"own", "b"}, frozenset())
    targets_LE = plan_targets(view(1, OWN, A, B), reach, 2, NUM_EXPERTS)
    assert targets_LE.tolist() == [[HERE, HERE, BY_PYTHON, BY_PYTHON]] * 2
    reach = Reach("own", {"a": 1}, {"own", "a", "b"}, frozenset())
    targets_LE = plan_targets(view(1, OWN, A, B), reach, 2, NUM_EXPERTS)
    assert targets_LE.tolist() == [[HERE, HERE, 1, 1]] * 2


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (CallState.LOST, 0),
        (CallState.REFUSED, RefusalReason.NOT_HELD.value),
        (CallState.REFUSED, RefusalReason.FAULT.value),
        # Of a worker that knows more reasons than this router.
        (CallState.REFUSED, 77),
    ],
)
def test_what_one_worker_does_not_compute_another_is_asked(
    bench: Bench, state: CallState, status: int
) -> None:
    bench.stop(call_to(1, state, status=status))
    assert not bench.node.resumed
    (call, _) = bench.links["b"].asked[0]
    assert (call.layer, call.expert_ids_TA.tolist()) == (LAYER, [[-1, 2], [3, -1]])
    bench.answer("b")
    assert bench.is_whole
    assert all(bench.node.filled[place] == expected(place) for place in FAR_PLACES.tolist())
    assert bench.dispatcher.num_resent == 2


def test_loss_is_told_to_the_links(bench: Bench) -> None:
    before = bench.links["a"]
    bench.stop(call_to(1, CallState.LOST))
    assert before.is_closed and bench.links["a"] is not before


def test_loss_of_an_older_link_does_not_end_a_newer_one(bench: Bench) -> None:
    bench.table.give_up("a")
    bench.tasks.run_ready()
    newer = bench.links["a"]
    bench.stop(call_to(1, CallState.LOST))
    assert bench.links["a"] is newer and not newer.is_closed
    assert sum(len(link.asked) for link in bench.links.values()) == 1


def test_links_that_are_gone_are_forgotten(bench: Bench) -> None:
    for batch_id in range(6, 26):
        bench.exchange.end(batch_id - 1, is_done=True)
        bench.table.give_up("a")
        bench.tasks.run_ready()
        bench.exchange.begin(step=batch_id, batch_id=batch_id, caution_s=None)
    assert len(vars(bench.exchange)["_workers"]) == 2
    bench.exchange.end(25, is_done=True)


def test_places_that_were_never_asked_are_asked(bench: Bench) -> None:
    bench.stop()
    bench.answer("a")
    bench.answer("b") if bench.links["b"].asked else None
    assert bench.is_whole


def test_late_worker_is_marked_and_another_asked_and_its_answer_still_counts(
    bench: Bench,
) -> None:
    bench.stop(call_to(1, CallState.OPEN, waited_s=2.0))
    bench.advance(0.0)
    assert bench.table.is_silent("a") and bench.dispatcher.num_hedged == 1
    assert len(bench.links["b"].asked) == 1
    bench.node.calls = [call_to(1, CallState.ANSWERED)]
    bench.look()
    bench.tasks.run_ready()
    assert bench.is_whole and not bench.table.is_silent("a")
    assert bench.node.filled[1] == expected(1)


def test_answers_before_a_worker_was_late_do_not_make_it_good_again(bench: Bench) -> None:
    bench.node.num_answers = {1: 5}
    bench.stop(call_to(1, CallState.OPEN, waited_s=2.0))
    bench.advance(0.0)
    bench.answer("b")
    bench.exchange.end(5, is_done=True)
    bench.exchange.begin(step=2, batch_id=6, caution_s=None)
    assert bench.table.is_silent("a")
    assert bench.node.plans[-1] == (1, [HERE, HERE, 2, 2])
    bench.exchange.end(6, is_done=True)
    bench.node.num_answers = {1: 1}
    bench.exchange.begin(step=3, batch_id=7, caution_s=None)
    assert not bench.table.is_silent("a")
    bench.exchange.end(7, is_done=True)


def test_worker_within_its_time_is_waited_for(bench: Bench) -> None:
    bench.stop(call_to(1, CallState.OPEN, waited_s=0.0))
    bench.advance(0.04)
    assert not bench.links["b"].asked and not bench.table.is_silent("a")
    bench.node.calls = [call_to(1, CallState.ANSWERED)]
    bench.look()
    bench.tasks.run_ready()
    assert bench.is_whole and not bench.links["b"].asked


def test_answer_that_never_comes_ends_the_connection(bench: Bench) -> None:
    before = bench.links["a"]
    bench.stop(call_to(1, CallState.OPEN, waited_s=2.0))
    bench.advance(0.0)
    bench.answer("b")
    assert bench.is_whole
    bench.exchange.end(5, is_done=True)
    for _ in range(int(3 * LIMITS.timeout_s / LOOK_EVERY_S)):
        bench.advance(LOOK_EVERY_S)
    assert before.is_closed


def test_answer_that_comes_when_nobody_waits_keeps_the_connection(bench: Bench) -> None:
    before = bench.links["a"]
    bench.stop(call_to(1, CallState.OPEN, waited_s=2.0))
    bench.advance(0.0)
    bench.answer("b")
    bench.exchange.end(5, is_done=True)
    bench.node.unanswered = False
    for _ in range(int(3 * LIMITS.timeout_s / LOOK_EVERY_S)):
        bench.advance(LOOK_EVERY_S)
    assert not before.is_closed and not bench.table.is_silent("a")


def test_experts_that_fail_again_and_again_fail_the_batch(bench: Bench) -> None:
    bench.stop(call_to(1, CallState.REFUSED, status=RefusalReason.FAULT.value))
    for _ in range(MAX_FAULTS):
        for link in bench.links.values():
            for _, pending in link.asked:
                pending.resolve(Refusal(RefusalReason.FAULT, "the test wants it"))
        bench.advance(LIMITS.hedge_after_s)
    assert isinstance(bench.failure.error, RefusedError)
    assert not bench.node.resumed


def test_batch_that_nobody_needs_is_given_up(bench: Bench) -> None:
    bench.stop(batch=4)
    assert bench.node.given_up == [4] and not bench.links["a"].asked
    bench.stop(call_to(1, CallState.LOST))
    assert bench.links["b"].asked
    bench.exchange.end(5, is_done=False)
    bench.tasks.run_ready()
    assert bench.node.given_up == [4, 5]
    bench.answer("b")
    assert not bench.node.resumed and not bench.node.filled
    bench.stop(number=2)
    assert bench.node.given_up == [4, 5, 5]


def test_layer_waits_until_a_worker_holds_its_experts() -> None:
    bench = Bench(OWN)
    bench.stop()
    assert bench.dispatcher.is_parked
    bench.table.update(view(2, OWN, B))
    bench.tasks.run_ready()
    bench.advance(0.0)
    bench.answer("b")
    assert bench.is_whole and not bench.dispatcher.is_parked
    bench.exchange.end(5, is_done=True)
    bench.table.close()
    bench.tasks.close()
