"""Reports how the faults affected the clients: counts, stalls, a table. Pure.

The promise of a cluster is that no request fails, that every answer is bit-equal to the undisturbed
one, and that after each fault everything is fully replicated again. A complaint is a sentence about
one case in which the promise did not hold.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from milliways.benchmarks.chaos.answers import Outcome
from milliways.benchmarks.chaos.faults import (
    BREAKS_CONNECTIONS,
    ENDS_CLUSTER,
    LOSES_REQUESTS,
    Fault,
)
from milliways.benchmarks.chaos.requests import ChaosRequest

MAX_COMPLAINTS = 20
# A fault shows its effects within this time: peers notice a frozen worker within two seconds.
SHOWS_WITHIN_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRecord:
    """An injected fault: when it began and ended, and when all was fully replicated again."""

    fault: Fault
    victim: str
    began_s: float
    ended_s: float
    # None if the run ended before that.
    restored_s: float | None

    @property
    def recovery_s(self) -> float | None:
        return None if self.restored_s is None else self.restored_s - self.began_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How `milliways serve` ended after a fault that ends a cluster."""

    fault: Fault
    # None: it did not end.
    exit_code: int | None
    # The last line that it said; empty if it was silent.
    reason: str
    after_s: float
    # Processes that outlived it.
    num_left: int

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as promised."""
        promised = _EXIT_CODES[self.fault]
        if self.exit_code is None:
            return (f"has not ended within {self.after_s:.0f} s",)
        found: list[str] = []
        if self.exit_code != promised:
            found.append(f"ended with exit code {self.exit_code}, not {promised}")
        if _REASONS.get(self.fault, "") not in self.reason:
            found.append(f"did not say why it ended: {self.reason!r}")
        if self.num_left:
            found.append(f"left {self.num_left} processes")
        return tuple(found)

    def __str__(self) -> str:
        code = "did not end" if self.exit_code is None else f"exit code {self.exit_code}"
        said = f": {self.reason}" if self.reason else ""
        return f"{self.fault.value}: {code} after {self.after_s:.1f} s{said}"


# What `milliways serve` promises (docs/operations.md).
_EXIT_CODES = {Fault.SIGTERM: 0, Fault.KILL_RAYLET: 1}
_REASONS = {Fault.KILL_RAYLET: "raylet was killed by SIGKILL"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: the effects of one kind of fault, or of all faults."""

    name: str
    count: int
    num_requests: int
    num_failed: int
    num_differing: int
    # Requests whose answer came over more than one connection.
    num_resumed: int
    # The longest stall of each stream that ran during a fault, in the time around that fault.
    stalls_s: tuple[float, ...]
    first_tokens_s: tuple[float, ...] = ()
    recoveries_s: tuple[float, ...] = ()
    num_not_recovered: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of the table, the complaints, and how clusters ended that a fault ended."""

    rows: tuple[Row, ...]
    complaints: tuple[str, ...]
    endings: tuple[Ending, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the promise held: there is no complaint."""
        return not self.complaints

    @property
    def stalls_s(self) -> tuple[float, ...]:
        """The stalls of all streams that ran during a fault."""
        return self.rows[-1].stalls_s

    def as_record(self) -> dict[str, Any]:
        """The report as a dict, to write to a file; stalls are in milliseconds."""
        return {
            "holds": self.holds,
            "complaints": list(self.complaints),
            "rows": [_record(row) for row in self.rows],
            "endings": [str(ending) for ending in self.endings],
        }


def make_report(
    requests: Sequence[ChaosRequest],
    undisturbed: Sequence[Outcome],
    disturbed: Sequence[Outcome],
    records: Sequence[FaultRecord],
    endings: Sequence[Ending] = (),
) -> Report:
    """Compares every answer with the undisturbed one, and counts."""
    wanted = {outcome.request_index: outcome.answer for outcome in undisturbed}
    disturbed = [outcome.compared(wanted) for outcome in disturbed]
    rows = [_row("none (undisturbed)", undisturbed, ())]
    for fault in Fault:
        its = [one for one in records if one.fault is fault]
        if its:
            rows.append(_row(fault.value, _running(disturbed, its), its))
    rows.append(_row("all", disturbed, records))
    kept = [one for one in [*undisturbed, *disturbed] if not _may_be_lost(one, records)]
    complaints = [
        f"{requests[outcome.request_index]}: {outcome.error or outcome.difference}"
        for outcome in kept
        if outcome.error or outcome.difference
    ]
    complaints += [
        f"{requests[outcome.request_index]}: its connection broke, which no fault explains:"
        f" {one.reason}"
        for outcome in kept
        for one in outcome.answer.breaks
        if not _is_expected(one.at_s, records)
    ]
    complaints += [
        f"{one.fault.value} of {one.victim}: not fully replicated again"
        for one in records
        if one.restored_s is None and one.fault not in ENDS_CLUSTER
    ]
    complaints += [
        f"{ending.fault.value}: `milliways serve` {problem}"
        for ending in endings
        for problem in ending.problems
    ]
    return Report(tuple(rows), tuple(complaints), tuple(endings))


def _may_be_lost(outcome: Outcome, records: Sequence[FaultRecord]) -> bool:
    """Whether a request may have failed, because nobody was left to answer it.

    Even then its answer may not differ.
    """
    return not outcome.difference and any(
        outcome.was_running(one.began_s, one.ended_s)
        for one in records
        if one.fault in LOSES_REQUESTS
    )


def _is_expected(broke_at_s: float, records: Sequence[FaultRecord]) -> bool:
    """Whether a fault explains a break at that time. Only some faults may break connections."""
    for one in records:
        restored_s = float("inf") if one.restored_s is None else one.restored_s
        is_during = one.began_s <= broke_at_s <= restored_s + SHOWS_WITHIN_S
        if one.fault in BREAKS_CONNECTIONS and is_during:
            return True
    return False


def _running(outcomes: Sequence[Outcome], records: Sequence[FaultRecord]) -> list[Outcome]:
    """The requests that ran between the beginning of a fault and full replication."""
    spans = [(s.began_s, s.ended_s if s.restored_s is None else s.restored_s) for s in records]
    return [one for one in outcomes if any(one.was_running(*span) for span in spans)]


def _row(name: str, outcomes: Sequence[Outcome], records: Sequence[FaultRecord]) -> Row:
    hit = [one for one in outcomes if any(one.was_running(s.began_s, s.ended_s) for s in records)]
    stalls_s = (
        [max(one.stall_s(s.began_s, s.ended_s + SHOWS_WITHIN_S) for s in records) for one in hit]
        if records
        else [one.stall_s() for one in outcomes]
    )
    first_tokens_s = [one.first_token_s for one in (hit if records else outcomes)]
    recoveries = [s.recovery_s for s in records if s.fault not in ENDS_CLUSTER]
    return Row(
        name=name,
        count=len(records),
        num_requests=len(outcomes),
        num_failed=sum(bool(one.error) for one in outcomes),
        num_differing=sum(bool(one.difference) for one in outcomes),
        num_resumed=sum(bool(one.answer.breaks) for one in outcomes),
        stalls_s=tuple(stalls_s),
        first_tokens_s=tuple(s for s in first_tokens_s if s is not None),
        recoveries_s=tuple(r for r in recoveries if r is not None),
        num_not_recovered=sum(r is None for r in recoveries),
    )


def _record(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "count": row.count,
        "requests": row.num_requests,
        "failed": row.num_failed,
        "differing": row.num_differing,
        "resumed": row.num_resumed,
        "hit": len(row.stalls_s),
        "stall_ms": {
            f"p{round(100 * share)}": round(1000 * percentile(row.stalls_s, share), 1)
            for share in (0.5, 0.9, 0.99, 1.0)
        },
        "recovery_s_max": round(max(row.recoveries_s, default=0.0), 1),
    }


def format_report(report: Report) -> str:
    """A table for a terminal, with the complaints below it."""
    heading = (
        f"{'fault':<19} {'times':>5} {'requests':>8} {'failed':>6} {'differing':>9}"
        f" {'resumed':>7} {'hit':>5} {'stall p50':>9} {'p99':>8} {'max':>8} {'first p99':>9}"
        "  full replication after"
    )
    lines = [heading, *(_line(row) for row in report.rows)]
    lines += [
        "",
        "resumed: streams whose connection broke and whose clients reconnected",
        "hit: streams that ran during a fault",
        "stall: the longest wait between two tokens of a stream that was hit, around the fault",
        "first: the wait for the first token",
    ]
    lines += map(str, report.endings)
    lines += report.complaints[:MAX_COMPLAINTS]
    left = len(report.complaints) - MAX_COMPLAINTS
    if left > 0:
        lines.append(f"and {left} more complaints")
    lines.append("the promise holds" if report.holds else "THE PROMISE IS BROKEN")
    return "\n".join(lines)


def _line(row: Row) -> str:
    stalls = [_milliseconds(percentile(row.stalls_s, share)) for share in (0.5, 0.99, 1.0)]
    first = _milliseconds(percentile(row.first_tokens_s, 0.99))
    recovery = ""
    if row.recoveries_s:
        middle, longest = percentile(row.recoveries_s, 0.5), max(row.recoveries_s)
        recovery = f"{middle:.1f} s, at most {longest:.1f} s"
    if row.num_not_recovered:
        recovery += f" ({row.num_not_recovered} not)"
    return (
        f"{row.name:<19} {row.count or '-':>5} {row.num_requests:>8} {row.num_failed:>6}"
        f" {row.num_differing:>9} {row.num_resumed:>7} {len(row.stalls_s):>5} {stalls[0]:>9}"
        f" {stalls[1]:>8} {stalls[2]:>8} {first:>9}  {recovery}"
    ).rstrip()


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed; 0 if there are none."""
    in_order = sorted(values)
    if not in_order:
        return 0.0
    return in_order[min(len(in_order) - 1, max(0, -int(-share * len(in_order) // 1) - 1))]
