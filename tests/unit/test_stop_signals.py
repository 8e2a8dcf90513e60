"""What `milliways serve` makes of signals."""

import signal

import pytest

from milliways.cluster.cli.stop_signals import SAME_REQUEST_WITHIN_S, StopSignals, Wish

TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


def after(*numbers: int, apart_s: float = 1.0) -> StopSignals:
    signals = StopSignals()
    for i, number in enumerate(numbers):
        signals.take(number, 100.0 + i * apart_s)
    return signals


@pytest.mark.parametrize(
    ("numbers", "wish", "code"),
    [
        ((), Wish.SERVE, 0),
        ((TERM,), Wish.FINISH, 0),
        ((HUP,), Wish.FINISH, 0),
        ((INT,), Wish.STOP, 0),
        ((TERM, TERM), Wish.ABORT, 128 + TERM),
        ((TERM, INT), Wish.ABORT, 128 + INT),
        ((HUP, TERM, HUP), Wish.ABORT, 128 + HUP),
        ((INT, INT), Wish.ABORT, 128 + INT),
    ],
)
def test_first_signal_asks_and_second_ends(numbers: tuple[int, ...], wish: Wish, code: int) -> None:
    signals = after(*numbers)
    assert (signals.wish, signals.exit_code()) == (wish, code)


def test_signal_to_process_and_group_is_one_request() -> None:
    apart_s = SAME_REQUEST_WITHIN_S / 2
    assert after(TERM, TERM, apart_s=apart_s).wish is Wish.FINISH
    assert after(TERM, INT, apart_s=apart_s).wish is Wish.ABORT


def test_only_a_process_that_serves_has_something_to_finish() -> None:
    assert after(TERM).must_end(is_serving=False)
    assert not after(TERM).must_end(is_serving=True)
    assert after(INT).must_end(is_serving=True)
    assert after(TERM, TERM).must_end(is_serving=True)
    assert not after().must_end(is_serving=False)
