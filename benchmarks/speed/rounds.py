"""Takes turns: every round gives each workload to one contestant after the other.

A machine's speed drifts with what its neighbours do. Contestants measured minutes apart would be
compared under different weather; measured in turns, they share it. Each round begins with another
contestant, so that none always runs after the same one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from milliways.benchmarks.speed.contestant import Contestant, ContestantError
from milliways.benchmarks.speed.floors import MachineLimits
from milliways.benchmarks.speed.workload import Workload

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second of one contestant on one workload, one figure for each repeat."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Highest less lowest, in parts of the median."""
        return (max(self.samples) - min(self.samples)) / self.median


@dataclass(slots=True)
class Results:
    """All figures of a run. `notes` says who took no part, or not to the end."""

    limits: list[MachineLimits] = field(default_factory=list[MachineLimits])
    samples: dict[tuple[str, Workload], list[float]] = field(
        default_factory=dict[tuple[str, Workload], list[float]]
    )
    notes: list[str] = field(default_factory=list[str])

    def add(self, name: str, workload: Workload, tokens_per_s: float) -> None:
        self.samples.setdefault((name, workload), []).append(tokens_per_s)

    def find(self, name: str, workload: Workload) -> Speeds | None:
        """The figures of a contestant; None if it has none."""
        samples = self.samples.get((name, workload))
        return Speeds(tuple(samples)) if samples else None

    def ratio(self, ours: str, peer: str, workload: Workload) -> float | None:
        """How many times as fast as the peer we are: medians of the same run."""
        our_speeds, peer_speeds = self.find(ours, workload), self.find(peer, workload)
        return our_speeds.median / peer_speeds.median if our_speeds and peer_speeds else None


def run_rounds(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    num_repeats: int,
    read_limits: Callable[[], MachineLimits],
    report: Callable[[str], None],
) -> Results:
    """Measures everything `num_repeats` times; who fails is noted and asked no more."""
    results = Results()
    remaining = list(contestants)
    for repeat in range(num_repeats):
        results.limits.append(read_limits())
        for workload in workloads:
            for contestant in rotated(remaining, repeat):
                report(f"round {repeat + 1}/{num_repeats}  {workload.title}  {contestant.name}")
                try:
                    results.add(contestant.name, workload, contestant.measure(workload))
                except ContestantError as error:
                    results.notes.append(f"{contestant.name} failed at {workload.title}: {error}")
                    remaining.remove(contestant)
    return results


def rotated(items: Sequence[T], count: int) -> list[T]:
    """The items, beginning with another one at each count; a list of its own."""
    first = count % len(items) if items else 0
    return [*items[first:], *items[:first]]
