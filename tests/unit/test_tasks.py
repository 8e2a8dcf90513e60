"""Coroutines without an event loop: order, cancellation, and what is left over."""

import pytest

from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Cancelled, Pending, Signal, Tasks


def run_for(tasks: Tasks, clock: FakeClock, seconds: float) -> None:
    end_s = clock.now_s() + seconds
    while True:
        if not tasks.run_ready():
            next_s = tasks.next_timer_s()
            if next_s is None or next_s > end_s:
                break
            clock.advance_to(next_s)
    clock.advance_to(end_s)


def test_waiting_again_and_again_for_what_never_comes_leaves_nothing_behind() -> None:
    clock, signal = FakeClock(), Signal()
    tasks = Tasks(clock)

    async def wait_often() -> None:
        for _ in range(1000):
            await tasks.wait_for(signal.wait(), 0.01)
            await tasks.first_done((signal.wait(), tasks.start(tasks.sleep(0.01))))

    task = tasks.start(wait_often())
    run_for(tasks, clock, 60.0)
    assert task.is_done
    assert signal.wait()._callbacks == []


def test_a_task_woken_and_cancelled_at_once_can_still_wait_for_its_end() -> None:
    tasks = Tasks(FakeClock())
    woken: Pending[None] = Pending()
    tidied: Pending[str] = Pending()

    async def tidy_up() -> str:
        try:
            await woken
        except Cancelled:
            return await tidied
        return "was not cancelled"

    task = tasks.start(tidy_up())
    tasks.run_ready()
    woken.resolve(None)
    task.cancel()
    tasks.run_ready()
    assert not task.is_done
    tidied.resolve("tidied up")
    tasks.run_ready()
    assert task.result() == "tidied up"


def test_the_first_error_cancels_the_others() -> None:
    tasks = Tasks(FakeClock())
    seen: list[str] = []

    async def fail() -> None:
        raise ValueError("the first")

    async def wait() -> None:
        try:
            await Pending[None]()
        except Cancelled:
            seen.append("cancelled")
            raise

    task = tasks.start(tasks.gather([wait(), fail(), wait()]))
    tasks.run_ready()
    with pytest.raises(ValueError, match="the first"):
        task.result()
    assert seen == ["cancelled", "cancelled"]
    assert tasks.num_alive == 0
