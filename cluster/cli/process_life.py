"""The life of a process that serves: it works in one thread and obeys signals in another.

Starting Ray takes ten seconds and more, in which Ray hears no signal. The main thread does nothing
but wait, so it obeys at any moment; what must be undone, the `end` that it is given undoes.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from milliways.cluster.cli import exit_codes
from milliways.cluster.cli.messages import say
from milliways.cluster.cli.stop_signals import HANDLED, StopSignals, Wish

POLL_S = 0.2
GUARD_PERIOD_S = 1.0
# More than any ending should take.
END_TIMEOUT_S = 90.0
# What `end` still gets after a second signal.
ABORT_TIMEOUT_S = 3.0


class ProcessLife:
    """What the two threads know of each other.

    The main thread owns `_signals`; the working thread reads its `wish`, and sets `is_serving`.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        # Once it is true, running requests are worth waiting for.
        self.is_serving = False
        self._signals = StopSignals()
        self._wakes = threading.Event()
        self._has_worked = False
        # The first that ended the work, or that a guard found.
        self.error: BaseException | None = None

    @property
    def wish(self) -> Wish:
        return self._signals.wish

    def run(self, work: Callable[[], None], end: Callable[[], None]) -> None:
        """Runs `work` until it returns, fails or a signal ends it; then `end`. Never returns.

        Call it in the main thread. `work` returns soon after `stopped` is set, if it can; if it
        does not, it is left behind. The process leaves without Python's own ending, which would
        wait for it.
        """
        # nohup and shells have some signals ignored; a terminal's Ctrl-C is always meant.
        ignored = {n for n in HANDLED if signal.getsignal(n) is signal.SIG_IGN} - {signal.SIGINT}
        handled = [number for number in HANDLED if number not in ignored]
        self._handle(handled)
        threading.Thread(target=self._work, args=(work,), name="serve", daemon=True).start()
        while not self._has_worked and self.error is None:
            # Again and again, because Ray installs its own when it connects.
            self._handle(handled)
            if self._signals.must_end(is_serving=self.is_serving):
                break
            self._wakes.wait(POLL_S)
            self._wakes.clear()
        # From here on only a second signal counts.
        code = self._end(end)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _handle(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            signal.signal(number, self._take)

    def guard(self, check: Callable[[], None]) -> None:
        """Calls `check` every second from now on; an error that it raises ends the process."""
        threading.Thread(target=self._guard, args=(check,), name="guard", daemon=True).start()

    def _guard(self, check: Callable[[], None]) -> None:
        try:
            while True:
                check()
                time.sleep(GUARD_PERIOD_S)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self.stopped.set()
        self._wakes.set()

    def _take(self, number: int, frame: object) -> None:
        self._signals.take(number, time.monotonic())
        self.stopped.set()
        self._wakes.set()

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._fail(error)
        self._has_worked = True
        self._wakes.set()
        # The thread stays: Ray's processes end with the thread that started them.
        threading.Event().wait()

    def _end(self, end: Callable[[], None]) -> int:
        # What fails because the rest is stopped under it is not worth a word.
        error = self.error if self.wish < Wish.STOP else None
        say("stopping …")
        ending = threading.Thread(target=_try, args=(end,), name="end", daemon=True)
        ending.start()
        until_s = time.monotonic() + END_TIMEOUT_S
        while ending.is_alive() and self.wish is not Wish.ABORT and time.monotonic() < until_s:
            self._wakes.wait(POLL_S)
            self._wakes.clear()
        if self.wish is Wish.ABORT:
            # A second signal waits for nobody, but leaves no process behind either.
            ending.join(ABORT_TIMEOUT_S)
        # Last of all, where people look for it.
        return self._signals.exit_code() if error is None else _report(error)


def _report(error: BaseException) -> int:
    if isinstance(error, exit_codes.EXPECTED):
        return exit_codes.report(error)
    traceback.print_exception(error)
    return exit_codes.UNUSABLE


def _try(end: Callable[[], None]) -> None:
    try:
        end()
    except Exception:
        # The process leaves all the same.
        traceback.print_exc()
