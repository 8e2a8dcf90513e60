"""Who waits for whom on the way through the layers."""

import numpy as np

from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Tasks
from milliways.wire.calls import ExpertOutputs, Fence, Result, RunExperts
from milliways.wire.view import WorkerState
from milliways.workers.co_arrival import MAX_FRUITLESS_WAITS, CoArrival
from milliways.workers.core import WorkerCore

COMPUTE_S = 0.01


class SlowExperts:
    """Doubles its rows, and takes as long for two calls as for one."""

    def __init__(self, clock: FakeClock) -> None:
        self.num_sweeps = 0
        self._clock = clock

    def fault_of(self, call: RunExperts) -> None:
        return None

    def run(self, call: RunExperts) -> np.ndarray:
        self.num_sweeps += 1
        self._clock.advance_to(self._clock.now_s() + COMPUTE_S)
        return 2 * call.rows_TD


class Bench:
    """A core that two routers share, under a clock that computing and waiting move."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.tasks = Tasks(self.clock)
        self.experts = SlowExperts(self.clock)
        self.core = WorkerCore("w", 1, self.experts, None, self.tasks)
        self.core.fence.move(WorkerState.READY)
        self.tasks.start_service(self.core.serve())
        self.answers: list[tuple[str, int, float]] = []

    def ask(self, router_id: str, layer: int) -> None:
        fence = Fence(
            placement_epoch=0,
            incarnation=1,
            step=1,
            timeout_s=0.0,
            router_id=router_id,
            router_incarnation=1,
        )
        call = RunExperts(layer, np.ones((1, 2), np.float32), np.array([[0]], np.int32))

        def reply(result: Result) -> None:
            assert isinstance(result, ExpertOutputs)
            self.answers.append((router_id, layer, self.clock.now_s()))

        self.core.submit(call, fence, reply)

    def run(self) -> None:
        """As far as it goes without another call, and no further in time."""
        while self.tasks.run_ready():
            pass

    def wait(self) -> None:
        """Until the next timer."""
        timer_s = self.tasks.next_timer_s()
        assert timer_s is not None
        self.clock.advance_to(timer_s)
        self.run()


def warmed_up() -> Bench:
    """A model of eight layers; both have asked for the first, one after the other."""
    bench = Bench()
    for router_id, layer in (("a", 7), ("a", 0), ("b", 0)):
        bench.ask(router_id, layer)
        bench.run()
    bench.experts.num_sweeps = 0
    bench.answers.clear()
    return bench


def test_who_is_ahead_waits_and_both_are_computed_in_one_sweep() -> None:
    bench = warmed_up()
    bench.ask("a", 1)
    bench.run()
    assert bench.answers == []
    bench.ask("b", 1)
    bench.run()
    assert [(name, layer) for name, layer, _ in bench.answers] == [("a", 1), ("b", 1)]
    assert bench.experts.num_sweeps == 1


def test_wait_ends_after_part_of_what_computing_takes() -> None:
    bench = warmed_up()
    asked_s = bench.clock.now_s()
    bench.ask("a", 1)
    bench.run()
    bench.wait()
    ((_, _, answered_s),) = bench.answers
    assert asked_s + COMPUTE_S < answered_s < asked_s + 2 * COMPUTE_S


def test_who_is_behind_does_not_wait_and_overtakes_who_waits() -> None:
    bench = warmed_up()
    bench.ask("a", 1)
    bench.run()
    bench.wait()
    bench.ask("a", 2)
    bench.ask("b", 1)
    bench.run()
    assert [(name, layer) for name, layer, _ in bench.answers] == [("a", 1), ("b", 1)]
    bench.ask("b", 2)
    bench.run()
    assert [(name, layer) for name, layer, _ in bench.answers[2:]] == [("a", 2), ("b", 2)]


def test_nobody_waits_for_a_router_that_is_alone() -> None:
    bench = Bench()
    for layer in (0, 1, 2):
        bench.ask("a", layer)
        bench.run()
    assert len(bench.answers) == 3
    assert not bench.core.has_co_arrivals("a")


def test_router_that_does_not_come_is_not_waited_for_until_it_comes_again() -> None:
    company = CoArrival()
    for layer in range(6):
        company.came("a", layer)
    company.came("b", 3)
    for _ in range(MAX_FRUITLESS_WAITS):
        assert company.awaited("a", 5) == ["b"] and company.others("a")
        company.waited_without_result("b")
    assert company.awaited("a", 5) == [] and not company.others("a")
    company.came("b", 4)
    assert company.awaited("a", 5) == ["b"]


def test_layers_are_a_circle_half_of_which_is_ahead() -> None:
    company = CoArrival()
    for layer in range(8):
        company.came("a", layer)
    company.came("b", 6)
    assert company.awaited("a", 7) == ["b"]
    assert company.awaited("a", 6) == []
    # The next token's first layers: two behind, and then five.
    assert company.awaited("a", 0) == ["b"]
    assert company.awaited("a", 3) == []


def test_router_that_left_is_forgotten() -> None:
    company = CoArrival()
    company.came("a", 1)
    company.came("b", 0)
    company.left("b")
    assert company.awaited("a", 1) == [] and not company.others("a")
