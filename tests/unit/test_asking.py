"""Whoever asks for the next controller waits for it, but not for ever."""

from dataclasses import dataclass
from typing import Any

import pytest

from milliways.cluster.ray import asking
from milliways.cluster.ray.asking import (
    NEXT_CONTROLLER_TIMEOUT_S,
    ControllerGoneError,
    RunningController,
)
from milliways.wire.errors import ClusterError, UnavailableError


@dataclass
class FakeTime:
    """What the module takes from `time`."""

    now_s: float = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, delay_s: float) -> None:
        self.now_s += delay_s


class FakeController(RunningController):
    """Each of its answers is the next error, after its time; then it answers."""

    def __init__(self, clock: FakeTime, errors: list[tuple[float, ClusterError]]) -> None:
        self.clock = clock
        self.errors = errors

    def ask(self, method: str, *arguments: Any, timeout_s: float = 0.0) -> str:
        if not self.errors:
            return "answer"
        after_s, error = self.errors.pop(0)
        self.clock.sleep(after_s)
        raise error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(asking, "time", clock)
    return clock


def test_controller_that_never_begins_is_not_waited_for_without_end(clock: FakeTime) -> None:
    errors: list[tuple[float, ClusterError]] = [(25.0, UnavailableError("has not begun"))] * 99
    with pytest.raises(UnavailableError, match="has not begun"):
        FakeController(clock, errors).ask_next("prepare", timeout_s=35.0)
    assert clock.now_s < 100.0 + NEXT_CONTROLLER_TIMEOUT_S + 2 * 25.0


def test_next_controller_is_waited_for_from_the_death_of_the_last_one(clock: FakeTime) -> None:
    gone = ControllerGoneError("no controller")
    is_away = int(0.9 * NEXT_CONTROLLER_TIMEOUT_S / asking.POLL_S)
    errors: list[tuple[float, ClusterError]] = [(300.0, gone), *[(0.0, gone)] * is_away]
    assert FakeController(clock, errors).ask_next("scale", timeout_s=600.0) == "answer"
    errors = [(300.0, gone), *[(0.0, gone)] * 2 * is_away]
    with pytest.raises(ControllerGoneError):
        FakeController(clock, errors).ask_next("scale", timeout_s=600.0)
