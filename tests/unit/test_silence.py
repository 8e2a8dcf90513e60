"""How long a router may be silent before another one is asked as well."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milliways.cluster.ingress.routing.silence import HedgeLimits, SilenceDetector

LIMITS = HedgeLimits(after_s_min=0.1, after_s_max=10.0)


def received_every(gap_s: float, count: int) -> tuple[SilenceDetector, float]:
    """A router that sent messages at this interval, and the time of the last one."""
    detector = SilenceDetector(LIMITS)
    detector.begin(0.0)
    for i in range(count):
        detector.received((i + 1) * gap_s)
    return detector, count * gap_s


def silent_after_s(detector: SilenceDetector, now_s: float) -> float:
    """How long after a time it is called silent, in steps of 10 ms."""
    for i in range(10_000):
        detector.look(now_s + i / 100)
        if detector.is_silent:
            return i / 100
    raise AssertionError("never")


@pytest.mark.parametrize(
    ("gap_s", "expected_s"), [(0.01, 0.1), (0.1, 0.2), (0.4, 0.8), (30.0, 10.0)]
)
def test_patience_is_a_multiple_of_the_longest_silence_within_limits(
    gap_s: float, expected_s: float
) -> None:
    detector, now_s = received_every(gap_s, 20)
    assert silent_after_s(detector, now_s) == pytest.approx(expected_s, abs=0.011)


def test_router_that_has_not_sent_anything_has_a_second() -> None:
    detector = SilenceDetector(LIMITS)
    detector.begin(5.0)
    assert silent_after_s(detector, 5.0) == 1.0


def test_one_long_silence_is_forgotten() -> None:
    detector, now_s = received_every(0.1, 5)
    detector.received(now_s + 0.2)
    assert detector.patience_s == pytest.approx(0.4)
    for i in range(100):
        detector.received(now_s + 0.2 + 0.1 * (i + 1))
    assert detector.patience_s == pytest.approx(0.2)


def test_router_that_was_frozen_is_no_slower_than_before() -> None:
    detector, now_s = received_every(0.05, 5)
    assert silent_after_s(detector, now_s) == pytest.approx(0.1, abs=0.011)
    detector.received(now_s + 30.0)
    assert not detector.is_silent
    assert detector.patience_s == 0.1
    detector.hedged_too_early()
    assert detector.patience_s == 0.2


def test_router_that_is_always_slow_is_soon_waited_for() -> None:
    detector, now_s = received_every(0.01, 5)
    num_silences = 0
    for _ in range(20):
        detector.look(now_s + 1.9)
        was_silent = detector.is_silent
        num_silences += was_silent
        now_s += 2.0
        detector.received(now_s)
        if was_silent:
            detector.hedged_too_early()
    assert num_silences == 7


def test_listener_that_had_no_processor_blames_nobody() -> None:
    detector, now_s = received_every(0.05, 5)
    detector.slept(0.5, now_s + 0.55)
    detector.look(now_s + 0.55)
    assert not detector.is_silent
    assert silent_after_s(detector, now_s + 0.5) == pytest.approx(0.1, abs=0.011)


def test_ping_comes_before_the_verdict() -> None:
    detector, now_s = received_every(0.1, 5)
    assert not detector.wants_ping(now_s + 0.05)
    assert detector.wants_ping(now_s + 0.11)
    detector.look(now_s + 0.11)
    assert not detector.is_silent


@given(st.lists(st.floats(0.0, 100.0), max_size=50))
def test_patience_stays_within_limits(gaps_s: list[float]) -> None:
    detector, now_s = SilenceDetector(LIMITS), 0.0
    detector.begin(now_s)
    for gap_s in gaps_s:
        now_s += gap_s
        detector.look(now_s)
        detector.received(now_s)
        assert LIMITS.after_s_min <= detector.patience_s <= LIMITS.after_s_max
        assert 0 < detector.look_after_s < detector.patience_s
        assert not detector.is_silent


def test_message_after_the_sleep_counts_from_when_it_came() -> None:
    detector, now_s = received_every(0.05, 5)
    detector.received(now_s + 0.5)
    detector.slept(0.5, now_s + 0.5)
    assert silent_after_s(detector, now_s + 0.5) == pytest.approx(detector.patience_s, abs=0.011)


def test_router_whose_first_message_was_late_still_has_a_second() -> None:
    detector = SilenceDetector(LIMITS)
    detector.begin(0.0)
    detector.look(2.0)
    detector.received(2.0)
    assert detector.patience_s == 1.0
