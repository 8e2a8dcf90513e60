"""Formats results as Markdown tables: speeds, ratios, and the limits of the machine."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from milliways.benchmarks.speed.floors import Ceiling, MachineLimits, Work, ceiling, work_of
from milliways.benchmarks.speed.machine import median_limits
from milliways.benchmarks.speed.rounds import Results
from milliways.benchmarks.speed.workload import Workload
from milliways.model.config import ModelConfig

# Medians are marked if their spread is larger than this.
NOISY_SPREAD = 0.2
_ABSENT = "-"


class Report:
    """Formats the results of named contestants with a model."""

    def __init__(
        self,
        config: ModelConfig,
        workloads: Sequence[Workload],
        ours: Sequence[str],
        peers: Sequence[str],
        results: Results,
    ) -> None:
        self._workloads = workloads
        self._ours = ours
        self._peers = peers
        self._results = results
        self._limits = median_limits(results.limits)
        self._works: list[Work] = [work_of(config, workload) for workload in workloads]
        self._ceilings: list[Ceiling] = [ceiling(work, self._limits) for work in self._works]

    def format(self) -> str:
        """All tables."""
        parts = [self._speeds()]
        if self._peers:
            parts += [self._ratios(name) for name in self._ours]
        parts += [self._floors(), _format_limits(self._limits)]
        if self._results.notes:
            parts.append("\n".join(f"- {note}" for note in self._results.notes))
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Every sample, and the limits of every round."""
        return {
            "tokens_per_s": {
                name: {
                    workload.title: list(speeds.samples)
                    for workload in self._workloads
                    if (speeds := self._results.find(name, workload))
                }
                for name in (*self._ours, *self._peers)
            },
            "limits": [asdict(limits) for limits in self._results.limits],
            "floors": {
                workload.title: asdict(work)
                | {"ceiling_tokens_per_s": top.tokens_per_s, "bound": top.bound.value}
                for workload, work, top in zip(
                    self._workloads, self._works, self._ceilings, strict=True
                )
            },
            "notes": self._results.notes,
        }

    def _speeds(self) -> str:
        num_repeats = len(self._results.limits)
        rows = [
            [name, *(self._speed(name, workload) for workload in self._workloads)]
            for name in (*self._ours, *self._peers)
        ]
        return self._table(f"tokens/s, median of {num_repeats}", rows)

    def _speed(self, name: str, workload: Workload) -> str:
        speeds = self._results.find(name, workload)
        if speeds is None:
            return _ABSENT
        mark = " (?)" if speeds.spread > NOISY_SPREAD else ""
        return f"{format_number(speeds.median)}{mark}"

    def _ratios(self, ours: str) -> str:
        rows = [
            [peer, *(self._ratio(ours, peer, workload) for workload in self._workloads)]
            for peer in self._peers
        ]
        return self._table(f"{ours}, times as fast as", rows)

    def _ratio(self, ours: str, peer: str, workload: Workload) -> str:
        ratio = self._results.ratio(ours, peer, workload)
        return _ABSENT if ratio is None else f"{ratio:.2f}"

    def _floors(self) -> str:
        works, tops = self._works, self._ceilings
        rows = [
            ["read, MB a step", *(f"{work.read_bytes / 1e6:.0f}" for work in works)],
            ["compute, GFLOP a token", *(f"{_gflop_per_token(work):.2f}" for work in works)],
            ["ceiling, tokens/s", *(format_number(top.tokens_per_s) for top in tops)],
            ["set by", *(top.bound.value for top in tops)],
        ]
        rows += [[f"{name} reaches", *self._shares(name)] for name in (*self._ours, *self._peers)]
        return self._table("floors (8-bit weights)", rows)

    def _shares(self, name: str) -> Iterable[str]:
        for workload, top in zip(self._workloads, self._ceilings, strict=True):
            speeds = self._results.find(name, workload)
            yield f"{speeds.median / top.tokens_per_s:.0%}" if speeds else _ABSENT

    def _table(self, title: str, rows: Sequence[Sequence[str]]) -> str:
        return format_table([title, *(workload.title for workload in self._workloads)], rows)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also easy to read as plain text."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(_right, line[1:], widths[1:])]) + " |"
        for line in (header, rule, *rows)
    )


def format_number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _right(cell: str, width: int) -> str:
    return cell.rjust(width)


def _gflop_per_token(work: Work) -> float:
    return work.flops / work.num_tokens / 1e9


def _format_limits(limits: MachineLimits) -> str:
    return (
        f"read bandwidth {limits.read_bytes_per_s_1_thread / 1e9:.1f} GB/s by one thread, "
        f"{limits.read_bytes_per_s / 1e9:.1f} by all; float32 multiply-add "
        f"{limits.flops_per_s_1_thread / 1e9:.0f} GFLOP/s by one thread, "
        f"{limits.flops_per_s / 1e9:.0f} by all (medians of the rounds)"
    )
