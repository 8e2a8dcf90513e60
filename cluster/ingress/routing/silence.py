"""Decides whether a router is silent for too long. Pure: times are arguments.

Each token of any request counts as a message of the router, and so does the answer to a ping. A
step may take milliseconds or seconds, so the allowed silence is a multiple of the router's longest
recent silence. If a request was hedged but the silent router still sends the next token first, its
allowed silence doubles. So hedging that does not help soon ends.
"""

from dataclasses import dataclass

from milliways.cluster.settings.config import IngressSettings
from milliways.wire.latency import LatencyEstimate, patience_s

# A router may be silent for this many times its longest recent silence.
_SILENCES = 2.0
# The weight of a silence halves in this time.
_HALVED_AFTER_S = 5.0
# How long a router may be silent before its first message.
_FIRST_PATIENCE_S = 1.0
# Number of checks of a silent router in its allowed time; it is pinged after half of that time.
_LOOKS = 4

_DEFAULTS = IngressSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeLimits:
    """The shortest and the longest silence of a router before others are asked as well."""

    after_s_min: float = _DEFAULTS.hedge_after_s_min
    after_s_max: float = _DEFAULTS.hedge_after_s_max


class SilenceDetector:
    """Detects the silence of one router from the times of its messages.

    Invariant: `is_silent` is set only by `look`, and only after `patience_s` without a message.
    """

    def __init__(self, limits: HedgeLimits) -> None:
        self._limits = limits
        self._silence = LatencyEstimate()
        self._since_s = 0.0
        self.is_silent = False

    @property
    def patience_s(self) -> float:
        """How long the router may be silent."""
        return patience_s(
            self._silence.longest_s,
            multiple=_SILENCES,
            first_s=_FIRST_PATIENCE_S,
            least_s=self._limits.after_s_min,
            most_s=self._limits.after_s_max,
        )

    @property
    def look_after_s(self) -> float:
        """Seconds until the next `look`."""
        return self.patience_s / _LOOKS

    def begin(self, now_s: float) -> None:
        """From now on messages are expected."""
        self._since_s = now_s

    def received(self, now_s: float) -> None:
        """A message arrived."""
        silence_s = max(0.0, now_s - self._since_s)
        fading = 0.5 ** (silence_s / _HALVED_AFTER_S)
        self._silence.observe(silence_s, fading=fading, counts=not self.is_silent)
        self._since_s = now_s
        self.is_silent = False

    def hedged_too_early(self) -> None:
        """The router was called silent, but sent the next token before the other routers."""
        self._silence.raise_to(self.patience_s)

    def slept(self, by_s: float, now_s: float) -> None:
        """This process itself did not run for `by_s`, so it could not have received anything."""
        self._since_s = min(self._since_s + by_s, now_s)

    def look(self, now_s: float) -> None:
        """Calls the router silent if its allowed time is over."""
        if now_s - self._since_s >= self.patience_s:
            self.is_silent = True

    def wants_ping(self, now_s: float) -> bool:
        """Whether to ping the router, because it has been silent for half of its allowed time."""
        return now_s - self._since_s >= self.patience_s / 2
