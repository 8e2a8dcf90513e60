"""Measures a hop of the data plane: rows go to a worker, and rows of the same size come back.

Contestants send and return the same bytes in turn: blocking sockets and a bare grpc.aio stream, our
two links, and our two kinds of rings inside a compiled step. Each is a pair of processes that run
`programs.run_hop`. Sockets and bare stream are floors: the least that a hop of their kind can take.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from milliways.benchmarks.speed.contestant import ContestantError
from milliways.benchmarks.speed.rounds import rotated
from milliways.benchmarks.speed.table import format_table

CONTESTANTS = ("uds", "tcp", "aio", "ring", "carried", "shm", "grpc")
# For each of our links: its floor, and how many times as long as the floor it is to take at most.
AIMS = {
    "ring": ("uds", 1.0),
    "carried": ("tcp", 2.0),
    "shm": ("uds", 2.0),
    "grpc": ("aio", 1.15),
}
NUM_TOKENS = (1, 32, 256)
_TITLES = {
    "uds": "Unix socket, blocking: floor",
    "tcp": "TCP socket, blocking: floor",
    "ring": "ring of shared memory, in a step",
    "carried": "ring over TCP, in a step",
    "shm": "shared memory link",
    "aio": "grpc.aio stream, bare: floor",
    "grpc": "gRPC link",
}

_PROGRAM = "milliways.benchmarks.speed.programs.run_hop"
_NUM_WARM_UP_CALLS = 20


@dataclass(frozen=True, slots=True)
class Hop:
    """All round trips of one contestant with `num_tokens` tokens each way."""

    contestant: str
    num_tokens: int
    seconds: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return median(self.seconds) * 1e6

    @property
    def least_us(self) -> float:
        return min(self.seconds) * 1e6


@dataclass(frozen=True, slots=True)
class HopRatio:
    """One of our links beside its floor.

    `ratio` is a median over the rounds: in each round, our median is divided by the floor's.
    """

    contestant: str
    floor: str
    num_tokens: int
    ratio: float
    aim: float

    @property
    def is_reached(self) -> bool:
        return self.ratio <= self.aim


@dataclass(frozen=True, slots=True)
class HopFigures:
    """Everything a run measured."""

    hops: tuple[Hop, ...]
    ratios: tuple[HopRatio, ...]

    def find(self, contestant: str, num_tokens: int) -> Hop:
        """The figures of one contestant with one number of tokens."""
        wanted = (contestant, num_tokens)
        return next(hop for hop in self.hops if (hop.contestant, hop.num_tokens) == wanted)

    def ratio(self, contestant: str, num_tokens: int) -> HopRatio:
        """The ratio of one of our links to its floor with one number of tokens."""
        wanted = (contestant, num_tokens)
        return next(r for r in self.ratios if (r.contestant, r.num_tokens) == wanted)


# Takes contestant, number of tokens and number of calls; returns the seconds of each call.
TimeCalls = Callable[[str, int, int], list[float]]


def measure_hops(
    num_rounds: int = 10, calls_per_round: int = 50, num_tokens: Sequence[int] = NUM_TOKENS
) -> HopFigures:
    """Starts all contestants, and measures them in turn.

    Raises:
        ContestantError: a contestant does not start or does not answer.
    """
    with ExitStack() as stack:
        programs = {name: stack.enter_context(_started(name)) for name in CONTESTANTS}

        def time_calls(contestant: str, tokens: int, calls: int) -> list[float]:
            return _time_calls(programs[contestant], tokens, calls)

        return take_turns(time_calls, num_rounds, calls_per_round, num_tokens)


def take_turns(
    time_calls: TimeCalls, num_rounds: int, calls_per_round: int, num_tokens: Sequence[int]
) -> HopFigures:
    """Measures all contestants with all numbers of tokens, in rounds.

    Each round begins with another contestant.
    """
    rounds: dict[tuple[str, int], list[list[float]]] = {}
    for tokens in num_tokens:
        for contestant in CONTESTANTS:
            time_calls(contestant, tokens, _NUM_WARM_UP_CALLS)
        for turn in range(num_rounds):
            for contestant in rotated(CONTESTANTS, turn):
                seconds = time_calls(contestant, tokens, calls_per_round)
                rounds.setdefault((contestant, tokens), []).append(seconds)
    hops = [
        Hop(contestant, tokens, tuple(second for seconds in all_seconds for second in seconds))
        for (contestant, tokens), all_seconds in rounds.items()
    ]
    ratios = [
        HopRatio(ours, floor, tokens, _ratio(rounds[ours, tokens], rounds[floor, tokens]), aim)
        for tokens in num_tokens
        for ours, (floor, aim) in AIMS.items()
    ]
    return HopFigures(tuple(hops), tuple(ratios))


def format_hops(figures: HopFigures) -> str:
    """A Markdown table: microseconds of a round trip, and the ratios to the floors."""
    sizes = list(dict.fromkeys(hop.num_tokens for hop in figures.hops))
    rows: list[list[str]] = []
    for ours, (floor, aim) in AIMS.items():
        for name in (floor, ours):
            if any(row[0] == _TITLES[name] for row in rows):
                continue
            hops = [figures.find(name, size) for size in sizes]
            cells = [f"{hop.median_us:.0f} ({hop.least_us:.0f})" for hop in hops]
            rows.append([_TITLES[name], *cells])
        ratios = [figures.ratio(ours, size) for size in sizes]
        cells = [f"{r.ratio:.2f}{'' if r.is_reached else ' (missed)'}" for r in ratios]
        rows.append([f"times its floor, aim {aim:g}", *cells])
    return format_table(["µs, median (least)", *map(_size_title, sizes)], rows)


def hops_to_json(figures: HopFigures) -> dict[str, Any]:
    """Every sample, and the ratios with their aims."""
    return {
        "seconds": {
            f"{hop.contestant} {hop.num_tokens}": list(hop.seconds) for hop in figures.hops
        },
        "ratios": [asdict(ratio) for ratio in figures.ratios],
    }


def _size_title(num_tokens: int) -> str:
    return f"{num_tokens} token{'s' if num_tokens > 1 else ''}"


def _ratio(ours: list[list[float]], floor: list[list[float]]) -> float:
    # The samples of one round are compared, since they had the same conditions.
    return median(median(a) / median(b) for a, b in zip(ours, floor, strict=True))


@contextmanager
def _started(contestant: str) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", _PROGRAM, "client", contestant]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert program.stdin is not None and program.stdout is not None
    try:
        if not program.stdout.readline():
            raise ContestantError(f"{contestant} did not start")
        yield program
    finally:
        # The program ends when its input ends, and then ends its server.
        program.stdin.close()
        program.stdout.close()
        program.wait()


def _time_calls(program: subprocess.Popen[str], num_tokens: int, num_calls: int) -> list[float]:
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write(json.dumps({"tokens": num_tokens, "calls": num_calls}) + "\n")
    program.stdin.flush()
    line = program.stdout.readline()
    if not line:
        raise ContestantError(f"no answer at {num_tokens} tokens")
    return json.loads(line)["seconds"]
