"""What the endpoints add to a request: to the first token, and to each token after it.

The same request goes to all endpoints in turn. The floor is the router's own stream, which the
ingress reads. HTTP adds Ray Serve's proxy and the ingress to it, gRPC the ingress alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from milliways.benchmarks.speed.rounds import rotated
from milliways.benchmarks.speed.table import format_table

FLOOR = "router"
_TITLES = {
    "router": "router's own stream: floor",
    "grpc": "gRPC, through the ingress",
    "http": "HTTP, through Serve and the ingress",
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the first and the last token of a request arrived, and how many tokens there were."""

    first_s: float
    last_s: float
    num_tokens: int
    # When each piece of the stream arrived.
    arrivals_s: tuple[float, ...] = ()

    @property
    def token_s(self) -> float:
        """Seconds per token after the first."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


# Sends the request to one endpoint, and returns the times of its tokens.
Send = Callable[[], Timeline]


@dataclass(frozen=True, slots=True)
class EndpointFigures:
    """The times of all requests to one endpoint."""

    endpoint: str
    timelines: tuple[Timeline, ...]

    @property
    def first_ms(self) -> tuple[float, float]:
        """Milliseconds to the first token: median and least."""
        return _median_and_least([line.first_s for line in self.timelines])

    @property
    def token_ms(self) -> tuple[float, float]:
        """Milliseconds per token after the first: median and least."""
        return _median_and_least([line.token_s for line in self.timelines])


def measure_endpoints(endpoints: Mapping[str, Send], num_rounds: int) -> list[EndpointFigures]:
    """Sends a request to all endpoints in each round.

    Each round begins with another endpoint. The first round warms up and is not counted.
    """
    timelines: dict[str, list[Timeline]] = {name: [] for name in endpoints}
    for turn in range(num_rounds + 1):
        for name in rotated(list(endpoints), turn):
            timeline = endpoints[name]()
            if turn:
                timelines[name].append(timeline)
    return [EndpointFigures(name, tuple(lines)) for name, lines in timelines.items()]


def format_endpoints(figures: Sequence[EndpointFigures]) -> str:
    """A Markdown table in milliseconds: each endpoint's times, and what it adds to the floor."""
    floor = next(one for one in figures if one.endpoint == FLOOR)
    rows: list[list[str]] = []
    for one in figures:
        added = ["", ""] if one is floor else _added(one, floor)
        rows.append(
            [_TITLES[one.endpoint], _pair(one.first_ms), added[0], _pair(one.token_ms), added[1]]
        )
    header = ["ms, median (least)", "first token", "added", "each token after", "added"]
    return format_table(header, rows)


def endpoints_to_json(figures: Sequence[EndpointFigures]) -> dict[str, Any]:
    """Every sample, in seconds."""
    return {
        one.endpoint: {
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
