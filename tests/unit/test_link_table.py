"""A router's links to workers: none is left open, none is waited for in vain."""

from collections.abc import Iterator

import pytest

from milliways.router.links.link_table import SLOWNESS_HALF_LIFE_S, LinkTable
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.calls import AbandonBatch, Abandoned, Call, Fence, Result
from milliways.wire.errors import PeerLostError
from milliways.wire.links import WorkerLink
from milliways.wire.view import ClusterView, Member, WorkerState

MEMBER = Member(worker_id="w", incarnation=1, address="", state=WorkerState.READY)
VIEW = ClusterView(placement_epoch=1, members={"w": MEMBER})


class FakeLink:
    """A link that answers when the test says so."""

    transport = "fake"
    is_local = False
    exchange_link = 0

    def __init__(self) -> None:
        self.asked: list[Pending[Result]] = []
        self.is_closed = False

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        self.asked.append(Pending())
        return self.asked[-1]

    def close(self) -> None:
        self.is_closed = True
        for pending in self.asked:
            pending.fail(PeerLostError("w", "closed"))


class Bench:
    """A table whose links open when the test says so."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.tasks = Tasks(self.clock)
        self.opening: list[Pending[WorkerLink]] = []
        self.table = LinkTable("r", 1, self._connect, self.tasks)
        self.table.update(VIEW)
        self.tasks.run_ready()

    def open(self) -> FakeLink:
        link = FakeLink()
        self.opening[-1].resolve(link)
        self.tasks.run_ready()
        return link

    def advance(self, seconds: float) -> None:
        self.clock.advance_to(self.clock.now_s() + seconds)
        self.tasks.run_ready()

    def ask(self, num_rows: int = 0) -> Pending[Result]:
        return self.table.ask("w", AbandonBatch(1), step=1, timeout_s=1.0, num_rows=num_rows)

    def ask_impatiently(self, late_after_s: float) -> Pending[Result]:
        return self.table.ask(
            "w", AbandonBatch(1), step=1, timeout_s=1.0, late_after_s=late_after_s
        )

    def ask_untimed(self) -> Pending[Result]:
        return self.table.ask("w", AbandonBatch(1), step=1, timeout_s=1.0, is_timed=False)

    def _connect(self, member: Member) -> Pending[WorkerLink]:
        self.opening.append(Pending())
        return self.opening[-1]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.table.close()
    made.tasks.close()


def test_link_that_opens_when_its_worker_is_gone_is_closed(bench: Bench) -> None:
    bench.table.update(ClusterView(placement_epoch=2, members={}))
    bench.tasks.run_ready()
    assert bench.open().is_closed


def test_link_that_opens_as_the_table_closes_is_closed(bench: Bench) -> None:
    link = FakeLink()
    bench.opening[-1].resolve(link)
    bench.table.close()
    bench.tasks.run_ready()
    assert link.is_closed
    assert bench.tasks.num_alive == 0


def test_link_whose_answer_never_comes_is_given_up_although_nobody_waits(bench: Bench) -> None:
    link = bench.open()
    pending = bench.ask(num_rows=3)
    bench.table.abandon("w", pending, within_s=2.0)
    bench.advance(1.9)
    assert not link.is_closed and bench.table.num_rows_out("w") == 3
    bench.advance(0.2)
    assert link.is_closed and bench.table.num_rows_out("w") == 0


def test_link_whose_answer_comes_late_stays(bench: Bench) -> None:
    link = bench.open()
    pending = bench.ask()
    bench.table.abandon("w", pending, within_s=2.0)
    link.asked[0].resolve(Abandoned())
    bench.advance(5.0)
    assert not link.is_closed
    assert bench.tasks.next_timer_s() is None


def test_worker_that_was_given_up_gets_twice_the_time_for_a_while(bench: Bench) -> None:
    bench.open()
    assert bench.table.slowness("w") == 1.0
    bench.table.give_up("w")
    assert bench.table.slowness("w") == 2.0
    bench.tasks.run_ready()
    bench.open()
    bench.table.give_up("w")
    assert bench.table.slowness("w") == 4.0
    bench.advance(SLOWNESS_HALF_LIFE_S)
    assert bench.table.slowness("w") == 2.0


def test_another_incarnation_of_a_worker_starts_with_a_clean_record(bench: Bench) -> None:
    bench.open()
    bench.table.give_up("w")
    later = Member(worker_id="w", incarnation=2, address="", state=WorkerState.READY)
    bench.table.update(ClusterView(placement_epoch=2, members={"w": later}))
    assert bench.table.slowness("w") == 1.0


def test_answer_that_is_not_timed_changes_no_latency(bench: Bench) -> None:
    link = bench.open()
    asked, untimed = bench.ask(), bench.ask_untimed()
    bench.advance(0.01)
    link.asked[0].resolve(Abandoned())
    bench.table.mark_late("w")
    bench.advance(50.0)
    link.asked[1].resolve(Abandoned())
    assert asked.is_done and untimed.is_done
    assert bench.table.latency_s("w") == pytest.approx(0.01)
    assert bench.table.is_silent("w")
    bench.ask_untimed()
    link.asked[-1].fail(PeerLostError("w", "it broke"))
    assert not bench.table.is_open("w")


def test_worker_that_was_frozen_is_no_slower_than_before(bench: Bench) -> None:
    link = bench.open()
    for took_s in (0.05, 30.0):
        bench.ask_impatiently(0.2)
        bench.advance(took_s)
        link.asked[-1].resolve(Abandoned())
    assert bench.table.latency_s("w") == pytest.approx(0.05, rel=0.02)
    bench.table.hedged_too_early("w", 0.2)
    assert bench.table.latency_s("w") == 0.2


def test_link_reopened_to_the_same_incarnation_keeps_its_latency(bench: Bench) -> None:
    link = bench.open()
    bench.ask()
    bench.advance(0.01)
    link.asked[0].resolve(Abandoned())
    bench.table.give_up("w")
    bench.tasks.run_ready()
    bench.open()
    assert bench.table.is_open("w")
    assert bench.table.latency_s("w") == pytest.approx(0.01)
