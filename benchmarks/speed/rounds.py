"""Measures in rounds: each round measures every workload with one contestant after the other.

A machine's speed changes with the load from other programs. Contestants that are measured minutes
apart would be compared under different conditions; those that take turns share them. Each round
begins with another contestant, so that none always runs after the same one.
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
    """Tokens per second of one contestant with one workload, one figure for each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """The difference of the highest and the lowest sample, divided by the median."""
        return (max(self.samples) - min(self.samples)) / self.median


@dataclass(slots=True)
class Results:
    """All figures of a run.

    `notes` names the contestants that did not take part, or failed.

    Invariant: `limits` has one entry for each round that began; `samples` has at most as many for
    each contestant and workload.
    """

    limits: list[MachineLimits] = field(default_factory=list[MachineLimits])
    samples: dict[tuple[str, Workload], list[float]] = field(
        default_factory=dict[tuple[str, Workload], list[float]]
    )
    notes: list[str] = field(default_factory=list[str])

    def add(self, name: str, workload: Workload, tokens_per_s: float) -> None:
        self.samples.setdefault((name, workload), []).append(tokens_per_s)

    def find(self, name: str, workload: Workload) -> Speeds | None:
        """The figures of a contestant with a workload; None if there are none."""
        samples = self.samples.get((name, workload))
        return Speeds(tuple(samples)) if samples else None

    def ratio(self, ours: str, peer: str, workload: Workload) -> float | None:
        """Our median speed divided by the peer's; None if either has no figures."""
        our_speeds, peer_speeds = self.find(ours, workload), self.find(peer, workload)
        return our_speeds.median / peer_speeds.median if our_speeds and peer_speeds else None


def run_rounds(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    num_repeats: int,
    read_limits: Callable[[], MachineLimits],
    report: Callable[[str], None],
) -> Results:
    """Measures everything `num_repeats` times. One that fails is noted and not measured again."""
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
    """A new list of the items, rotated by `count`."""
    first = count % len(items) if items else 0
    return [*items[first:], *items[:first]]
