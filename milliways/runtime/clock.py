"""Time, as something that is handed in."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only ever go up."""

    def now_s(self) -> float: ...


class SystemClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance_to(self, now_s: float) -> None:
        """Moves on; never back."""
        self._now_s = max(self._now_s, now_s)
