"""The speed of a worker's router, for status."""

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Rates:
    """The rate of tokens over the last `window_s` seconds."""

    window_s: float = 10.0
    marks: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    def per_s(self, num_tokens: int) -> float:
        """Records the total so far; returns its growth per second within the window."""
        now_s = time.monotonic()
        self.marks = [m for m in self.marks if now_s - m[0] <= self.window_s]
        self.marks.append((now_s, num_tokens))
        first_s, first = self.marks[0]
        return (num_tokens - first) / (now_s - first_s) if now_s > first_s else 0.0
