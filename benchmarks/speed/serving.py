"""What a client's way to a router costs: to the first token, and for each token after it.

The same request goes through all doors in turn. The router's own stream, as the ingress has it, is
the floor; HTTP goes through Ray Serve's proxy and the ingress, gRPC through the ingress alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from milliways.benchmarks.speed.rounds import rotated
from milliways.benchmarks.speed.table import format_table

DOORS = ("router", "grpc", "http")
FLOOR = "router"
_TITLES = {
    "router": "router's own stream: floor",
    "grpc": "gRPC, through the ingress",
    "http": "HTTP, through Serve and the ingress",
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """Of one request: when its first and its last token came, and how many there were."""

    first_s: float
    last_s: float
    num_tokens: int

    @property
    def token_s(self) -> float:
        """Seconds a token after the first."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


# Sends the request by one door, and comes back with what it saw.
Send = Callable[[], Timeline]


@dataclass(frozen=True, slots=True)
class EndpointFigures:
    """All requests through one door."""

    door: str
    timelines: tuple[Timeline, ...]

    @property
    def first_ms(self) -> tuple[float, float]:
        """To the first token: median and least."""
        return _median_and_least([line.first_s for line in self.timelines])

    @property
    def token_ms(self) -> tuple[float, float]:
        """For each token after it: median and least."""
        return _median_and_least([line.token_s for line in self.timelines])


def measure_endpoints(doors: Mapping[str, Send], num_rounds: int) -> list[EndpointFigures]:
    """Rounds of all doors, each round beginning with another one; the first does not count."""
    timelines: dict[str, list[Timeline]] = {name: [] for name in doors}
    for turn in range(num_rounds + 1):
        for name in rotated(list(doors), turn):
            timeline = doors[name]()
            if turn:
                timelines[name].append(timeline)
    return [EndpointFigures(name, tuple(lines)) for name, lines in timelines.items()]


def format_endpoints(figures: Sequence[EndpointFigures]) -> str:
    """A Markdown table, in milliseconds: what each door takes, and what it adds to the floor."""
    floor = next(one for one in figures if one.door == FLOOR)
    rows: list[list[str]] = []
    for one in figures:
        added = ["", ""] if one is floor else _added(one, floor)
        rows.append(
            [_TITLES[one.door], _pair(one.first_ms), added[0], _pair(one.token_ms), added[1]]
        )
    header = ["ms, median (least)", "first token", "added", "each token after", "added"]
    return format_table(header, rows)


def endpoints_to_json(figures: Sequence[EndpointFigures]) -> dict[str, Any]:
    """Every sample, in seconds."""
    return {
        one.door: {
            "first_token_s": [line.first_s for line in one.timelines],
            "token_s": [line.token_s for line in one.timelines],
        }
        for one in figures
    }


def _added(one: EndpointFigures, floor: EndpointFigures) -> list[str]:
    return [
        f"{one.first_ms[0] - floor.first_ms[0]:.2f}",
        f"{one.token_ms[0] - floor.token_ms[0]:.3f}",
    ]


def _median_and_least(seconds: Sequence[float]) -> tuple[float, float]:
    return median(seconds) * 1e3, min(seconds) * 1e3


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.2f} ({values[1]:.2f})"
