"""Notices that something does not answer any more, also when the question itself hangs."""

import threading
import time
from collections.abc import Callable

from milliways.wire.errors import RayGoneError


class Heartbeat:
    """Asks again and again, in a thread of its own, and remembers when there was an answer.

    *Invariant:* `last_answer_s` is the time of the last answer, or of the construction.
    """

    def __init__(
        self,
        ask: Callable[[], None],
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._period_s = period_s
        self._clock = clock
        self._gone: RayGoneError | None = None
        self._last_error = "no answer"
        self.last_answer_s = clock()

    def start(self) -> None:
        """Begins to ask, until the process ends."""
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def beat(self) -> None:
        """Asks once."""
        try:
            self._ask()
        except RayGoneError as error:
            self._gone = error
        except Exception as error:
            # It may be starting again: only its silence counts.
            self._last_error = str(error).partition("\n")[0] or type(error).__name__
        else:
            self.last_answer_s = self._clock()
            self._last_error = "no answer"

    def check(self, limit_s: float) -> None:
        """Raises RayGoneError if it is known to be gone, or silent for longer than the limit."""
        if self._gone is not None:
            raise self._gone
        silent_s = self._clock() - self.last_answer_s
        if silent_s > limit_s:
            raise RayGoneError(f"Ray has been silent for {silent_s:.0f} s: {self._last_error}")

    def _run(self) -> None:
        while True:
            self.beat()
            time.sleep(self._period_s)
