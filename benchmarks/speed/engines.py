"""Compares our speed with that of other engines: what `milliways bench` runs.

Our own process is one contestant for each kind of activations. Other engines take part if this
machine has them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from milliways.benchmarks.speed.contestant import Contestant, ContestantError, ProgramContestant
from milliways.benchmarks.speed.machine import LimitsReader, make_limits_reader
from milliways.benchmarks.speed.peers import PeerSetting, start_peers
from milliways.benchmarks.speed.rounds import Results, run_rounds
from milliways.benchmarks.speed.table import Report
from milliways.benchmarks.speed.workload import PROMPT_TOKENS, Kind, Workload
from milliways.model.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBench:
    """What is compared, and how often. `activations` and `peers` are names."""

    setting: PeerSetting
    dtype: str
    activations: tuple[str, ...]
    peers: tuple[str, ...]
    workloads: tuple[Workload, ...]
    num_rounds: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The figures of a run, and what they were measured with."""

    tables: Report
    about: dict[str, str]
    limits_method: str
    num_threads: int
    # Whether at least one figure of our own was measured.
    has_our_figures: bool

    def format(self) -> str:
        """All tables, and what was measured."""
        lines = [f"- {name}: {about}" for name, about in self.about.items()]
        lines.append(f"- limits: {self.limits_method}; threads: {self.num_threads}")
        lines.append(
            "- (?): the highest and the lowest sample differ by more than 20% of the median"
        )
        return "\n".join([self.tables.format(), "", *lines])

    def to_json(self) -> dict[str, Any]:
        """Every sample, and what was measured."""
        return self.tables.to_json() | {"about": self.about, "num_threads": self.num_threads}


def compare_engines(bench: EngineBench, report: Callable[[str], None]) -> Comparison:
    """Starts all contestants, runs the rounds, and ends the contestants.

    Raises:
        ModelError: our own process cannot be started.
    """
    setting, notes = bench.setting, list[str]()
    limits_reader: LimitsReader = make_limits_reader(setting.log_dir, setting.num_threads)
    with ExitStack() as running:

        def entered(contestants: Iterator[Contestant]) -> list[Contestant]:
            return [running.enter_context(closing(contestant)) for contestant in contestants]

        ours = entered(start_ours(bench, report))
        peers = entered(start_peers(bench.peers, setting, notes, report))
        everyone = [*ours, *peers]
        results = run_rounds(
            everyone, bench.workloads, bench.num_rounds, limits_reader.read, report
        )
    results.notes[:0] = notes
    names, peer_names = [c.name for c in ours], [c.name for c in peers]
    return Comparison(
        tables=Report(setting.config, bench.workloads, names, peer_names, results),
        about={contestant.name: contestant.about for contestant in everyone},
        limits_method=limits_reader.method,
        num_threads=setting.num_threads,
        has_our_figures=_has_figures(results, names, bench.workloads),
    )


def start_ours(bench: EngineBench, report: Callable[[str], None]) -> Iterator[Contestant]:
    """One contestant of our own for each kind of activations.

    Raises:
        ModelError: it cannot be started.
    """
    decodes = [workload for workload in bench.workloads if workload.kind is Kind.DECODE]
    prefills = [workload for workload in bench.workloads if workload.kind is Kind.PREFILL]
    longest = {
        "--max-batch": max((workload.size for workload in decodes), default=1),
        "--batch-tokens": max((w.num_context_tokens for w in decodes), default=PROMPT_TOKENS),
        "--prompt-tokens": max((workload.size for workload in prefills), default=1),
    }
    for kind in bench.activations:
        name = f"milliways {kind}"
        report(f"loading {name}")
        command = [sys.executable, "-m", "milliways.benchmarks.speed.programs.run_milliways"]
        command += [str(bench.setting.model_dir), "--dtype", bench.dtype, "--activations", kind]
        command += [word for flag, size in longest.items() for word in (flag, str(size))]
        log_path = bench.setting.log_dir / f"{kind}.log"
        try:
            yield ProgramContestant(name, command, os.environ, log_path)
        except ContestantError as error:
            raise ModelError(f"{name}: {error}") from error


def _has_figures(results: Results, names: list[str], workloads: tuple[Workload, ...]) -> bool:
    return any(results.find(name, workload) for name in names for workload in workloads)
