"""What signals ask of `milliways serve`, as a decision without a process.

The first SIGTERM or SIGHUP asks it to finish running requests and stop; the first Ctrl-C (SIGINT)
asks it to stop now. A second signal of any kind asks it to end at once.
"""

import signal
from enum import IntEnum

FINISHING = frozenset({signal.SIGTERM, signal.SIGHUP})
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and some supervisors send a signal to the process and then to its group: that is one
# request, not two.
SAME_REQUEST_WITHIN_S = 0.3


class Wish(IntEnum):
    """What is wanted, the more urgent the higher."""

    SERVE = 0
    FINISH = 1
    STOP = 2
    ABORT = 3


class StopSignals:
    """Follows the signals that a process received. *Invariant:* `wish` never decreases."""

    def __init__(self) -> None:
        self.wish = Wish.SERVE
        self.last_signal: int | None = None
        self._last_at_s = 0.0

    def take(self, number: int, now_s: float) -> None:
        """A signal arrived."""
        is_repeated = number == self.last_signal and now_s < self._last_at_s + SAME_REQUEST_WITHIN_S
        self.last_signal, self._last_at_s = number, now_s
        if is_repeated:
            return
        if self.wish is not Wish.SERVE:
            self.wish = Wish.ABORT
        else:
            self.wish = Wish.FINISH if number in FINISHING else Wish.STOP

    def must_end(self, *, is_serving: bool) -> bool:
        """Whether the process must end without waiting for anything."""
        return self.wish >= Wish.STOP or (self.wish is Wish.FINISH and not is_serving)

    def exit_code(self) -> int:
        """0 if the process ends as it was asked to; the shell's code of a signal after an abort."""
        if self.wish is Wish.ABORT and self.last_signal is not None:
            return 128 + self.last_signal
        return 0
