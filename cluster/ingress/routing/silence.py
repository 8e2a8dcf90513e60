"""Whether a router gives signs of life. Pure: times are given.

Every token is one, of whatever request, and so is the answer to a ping. How long a router may be
silent is learned from it, since a step may take milliseconds or seconds: a multiple of its longest
silence of late. One that was taken for silent and is first all the same has twice the time from
then on, so that hedging ends by itself where it does not help.
"""

from dataclasses import dataclass

# Patience in multiples of the longest silence, and after how long that is half forgotten.
_SILENCES = 2.0
_HALVED_AFTER_S = 5.0
# Patience with a router that was not heard of yet.
_FIRST_PATIENCE_S = 1.0
# Looks within one patience; half of it has to pass before a ping.
_LOOKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeLimits:
    """The shortest and the longest silence of a router before others are asked as well."""

    after_s_min: float = 0.1
    after_s_max: float = 60.0


class SilenceDetector:
    """What was heard of one router."""

    def __init__(self, limits: HedgeLimits) -> None:
        self._limits = limits
        self._longest_s: float | None = None
        self._since_s = 0.0
        self.is_silent = False

    @property
    def patience_s(self) -> float:
        longest_s = self._longest_s
        wanted_s = _FIRST_PATIENCE_S if longest_s is None else _SILENCES * longest_s
        return min(max(wanted_s, self._limits.after_s_min), self._limits.after_s_max)

    @property
    def look_after_s(self) -> float:
        """When to look again."""
        return self.patience_s / _LOOKS

    def begin(self, now_s: float) -> None:
        """From now on signs are expected."""
        self._since_s = now_s

    def heard(self, now_s: float) -> None:
        """A sign came."""
        silence_s = max(0.0, now_s - self._since_s)
        if self._longest_s is not None:
            self._longest_s *= 0.5 ** (silence_s / _HALVED_AFTER_S)
        # What was frozen is no slower than before.
        if not self.is_silent:
            self._longest_s = max(self._longest_s or 0.0, silence_s)
        self._since_s = now_s
        self.is_silent = False

    def hedged_too_early(self) -> None:
        """It was taken for silent, and had the next token before those who were asked as well."""
        self._longest_s = max(self._longest_s or 0.0, self.patience_s)

    def overslept(self, by_s: float, now_s: float) -> None:
        """The listener itself stood still for so long, and could not have heard any."""
        self._since_s = min(self._since_s + by_s, now_s)

    def look(self, now_s: float) -> None:
        """Takes a router for silent when its time is over."""
        if now_s - self._since_s >= self.patience_s:
            self.is_silent = True

    def wants_ping(self, now_s: float) -> bool:
        """Whether it should be asked for a sign: nothing has come of itself."""
        return now_s - self._since_s >= self.patience_s / 2
