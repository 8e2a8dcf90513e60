"""Finds stop strings in a text that arrives in pieces, and shows no part of one."""

from collections.abc import Sequence


class StopMatcher:
    """Holds back the end of the text while it may be the start of a stop string.

    With `keeps_match`, the stop string that was found is shown, and nothing after it.

    Invariant: `_held` is the longest end of the text with which a stop string starts; empty after a
    match.
    """

    def __init__(self, stop: Sequence[str], *, keeps_match: bool = False) -> None:
        self._stop = tuple(stop)
        self._keeps_match = keeps_match
        self._held = ""
        # The stop string that was found: of the first place, the first that was asked for.
        self.matched: str | None = None

    @property
    def has_matched(self) -> bool:
        return self.matched is not None

    def push(self, text: str) -> str:
        """Adds text; returns the part that can be shown, which is empty after a match."""
        if self.has_matched:
            return ""
        held = self._held + text
        places = [place for stop in self._stop if (place := held.find(stop)) >= 0]
        if places:
            first = min(places)
            self.matched = next(stop for stop in self._stop if held.find(stop) == first)
            self._held = ""
            return held[: first + len(self.matched) * self._keeps_match]
        num_held = self._longest_beginning(held)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def flush(self) -> str:
        """The text that was held back; no more text comes."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string starts."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stop):
                return length
        return 0
