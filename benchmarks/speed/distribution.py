"""What spreading a model over workers costs: a cluster's speed beside that of one process."""

from collections.abc import Sequence
from statistics import median

from milliways.benchmarks.speed.rounds import Results
from milliways.benchmarks.speed.table import format_table
from milliways.benchmarks.speed.workload import Workload

# Of one process's tokens a second, by batch size.
AIMS = {1: 0.6, 8: 0.75, 32: 0.85}


def paired_ratio(results: Results, ours: str, peer: str, workload: Workload) -> float | None:
    """Median over the rounds: both of a round had the same weather."""
    our_speeds, peer_speeds = results.find(ours, workload), results.find(peer, workload)
    if our_speeds is None or peer_speeds is None:
        return None
    pairs = zip(our_speeds.samples, peer_speeds.samples, strict=False)
    return median(one / other for one, other in pairs)


def format_aims(results: Results, ours: str, peer: str, workloads: Sequence[Workload]) -> str:
    """A Markdown table of what is reached of what is wanted."""
    ratios = [paired_ratio(results, ours, peer, workload) for workload in workloads]
    aims = [AIMS.get(workload.size) for workload in workloads]
    rows = [
        ["cluster / one process", *map(_ratio, ratios)],
        ["aim", *map(_ratio, aims)],
        ["reached", *map(_verdict, ratios, aims)],
    ]
    return format_table(["median of the rounds", *(workload.title for workload in workloads)], rows)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _verdict(ratio: float | None, aim: float | None) -> str:
    if ratio is None or aim is None:
        return "-"
    return "yes" if ratio >= aim else "no"
