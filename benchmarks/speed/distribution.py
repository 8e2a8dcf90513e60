"""Measures what it costs to distribute a model over workers: what `milliways bench cluster` runs.

A cluster's speed is compared with that of one process, which has as many threads as the workers
have together.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from milliways.benchmarks.speed.contestant import Contestant, ContestantError, ProgramContestant
from milliways.benchmarks.speed.machine import make_limits_reader
from milliways.benchmarks.speed.rounds import Results, run_rounds
from milliways.benchmarks.speed.table import Report, format_table
from milliways.benchmarks.speed.workload import Workload
from milliways.model.config import load_config
from milliways.model.errors import ModelError

CLUSTER, ALONE = "cluster", "one process"
# The share of one process's tokens per second that a cluster is to reach, by batch size. The narrow
# layers of the deep model show what is done between layers, and nothing else.
AIMS = {1: 0.65, 8: 0.8, 32: 0.9}
_DEEP_AIMS = {1: 0.75, 8: 0.8, 32: 0.85}
_DEEP_LAYERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterBench:
    """What is measured, and how often. Each worker has one thread."""

    model_dir: Path
    work_dir: Path
    num_workers: int
    transport: str
    dtype: str
    activations: str
    workloads: tuple[Workload, ...]
    num_rounds: int


@dataclass(frozen=True, slots=True)
class ClusterFigures:
    """The figures of a run, and what they were measured with."""

    tables: Report
    aims: str
    about: dict[str, str]
    # Whether every workload has figures of both contestants.
    is_complete: bool

    def format(self) -> str:
        """All tables, and what was measured."""
        lines = [f"- {name}: {about}" for name, about in self.about.items()]
        return "\n".join([self.tables.format(), "", self.aims, "", *lines])

    def to_json(self) -> dict[str, Any]:
        """Every sample, and what was measured."""
        return self.tables.to_json() | {"about": self.about}


def measure_cluster(bench: ClusterBench, report: Callable[[str], None]) -> ClusterFigures:
    """Starts both contestants, runs the rounds, and ends the contestants.

    Raises:
        ModelError: one cannot be started.
    """
    limits_reader = make_limits_reader(bench.work_dir, bench.num_workers)
    with ExitStack() as running:
        contestants = [
            running.enter_context(closing(contestant)) for contestant in _start(bench, report)
        ]
        results = run_rounds(
            contestants, bench.workloads, bench.num_rounds, limits_reader.read, report
        )
    names = (CLUSTER, ALONE)
    config = load_config(bench.model_dir)
    aims = _DEEP_AIMS if config.num_layers >= _DEEP_LAYERS else AIMS
    return ClusterFigures(
        tables=Report(config, bench.workloads, [CLUSTER], [ALONE], results),
        aims=format_aims(results, CLUSTER, ALONE, bench.workloads, aims),
        about={contestant.name: contestant.about for contestant in contestants},
        is_complete=all(results.find(name, w) for name in names for w in bench.workloads),
    )


def _start(bench: ClusterBench, report: Callable[[str], None]) -> Iterator[Contestant]:
    num_tokens = max(workload.num_context_tokens for workload in bench.workloads)
    max_batch = max(workload.size for workload in bench.workloads)
    common = ["--dtype", bench.dtype, "--activations", bench.activations]
    common += ["--max-batch", str(max_batch), "--batch-tokens", str(num_tokens)]
    workers = ["--workers", str(bench.num_workers), "--threads", "1"]
    programs: dict[str, list[str]] = {
        CLUSTER: ["run_cluster", *workers, "--transport", bench.transport],
        ALONE: ["run_milliways", "--prompt-tokens", "1", "--threads", str(bench.num_workers)],
    }
    for name, (program, *flags) in programs.items():
        report(f"loading {name}")
        module = f"milliways.benchmarks.speed.programs.{program}"
        command = [sys.executable, "-m", module, str(bench.model_dir), *flags, *common]
        try:
            yield ProgramContestant(name, command, os.environ, bench.work_dir / f"{program}.log")
        except ContestantError as error:
            raise ModelError(f"{name}: {error}") from error


def paired_ratio(results: Results, ours: str, peer: str, workload: Workload) -> float | None:
    """The median of the ratios of the rounds. Both speeds of a round had the same conditions."""
    our_speeds, peer_speeds = results.find(ours, workload), results.find(peer, workload)
    if our_speeds is None or peer_speeds is None:
        return None
    pairs = zip(our_speeds.samples, peer_speeds.samples, strict=False)
    return median(one / other for one, other in pairs)


def format_aims(
    results: Results,
    ours: str,
    peer: str,
    workloads: Sequence[Workload],
    wanted: Mapping[int, float],
) -> str:
    """A Markdown table of the ratios and the aims, which are by batch size."""
    ratios = [paired_ratio(results, ours, peer, workload) for workload in workloads]
    aims = [wanted.get(workload.size) for workload in workloads]
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
