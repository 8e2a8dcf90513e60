"""What the faults did to the clients: counts, stalls, a table. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from milliways.benchmarks.chaos.answers import Heard
from milliways.benchmarks.chaos.asks import Ask
from milliways.benchmarks.chaos.faults import BREAKING, Fault

MAX_COMPLAINTS = 20
# What a fault does shows so soon after it: frozen peers are noticed within two seconds.
SHOWS_WITHIN_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A fault as it was done: when it began and ended, and when all was replicated again."""

    fault: Fault
    victim: str
    began_s: float
    ended_s: float
    # None: it was not before the run ended.
    whole_s: float | None

    @property
    def recovery_s(self) -> float | None:
        return None if self.whole_s is None else self.whole_s - self.began_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is told of one kind of fault, or of all."""

    name: str
    count: int
    num_requests: int
    num_failed: int
    num_differing: int
    # Requests that came in over more than one connection.
    num_resumed: int
    # Of the streams that ran while the fault was being done, about that time.
    stalls_s: tuple[float, ...]
    first_tokens_s: tuple[float, ...] = ()
    recoveries_s: tuple[float, ...] = ()
    num_not_recovered: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The rows, and a sentence for each broken promise."""

    rows: tuple[Row, ...]
    complaints: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the promise did: nothing failed, nothing differs, everything came back."""
        return not self.complaints

    @property
    def stalls_s(self) -> tuple[float, ...]:
        """Of the streams that ran while a fault was being done."""
        return self.rows[-1].stalls_s

    def as_record(self) -> dict[str, Any]:
        """For a file: of each row the counts, and the stalls in milliseconds."""
        return {
            "holds": self.holds,
            "complaints": list(self.complaints),
            "rows": [_record(row) for row in self.rows],
        }


def make_report(
    asks: Sequence[Ask],
    undisturbed: Sequence[Heard],
    disturbed: Sequence[Heard],
    struck: Sequence[Struck],
) -> Report:
    """Compares every answer with that of the undisturbed run."""
    wanted = {heard.ask_index: heard.answer for heard in undisturbed}
    disturbed = [heard.judged(wanted) for heard in disturbed]
    rows = [_row("none (undisturbed)", undisturbed, ())]
    for fault in Fault:
        its = [one for one in struck if one.fault is fault]
        if its:
            rows.append(_row(fault.value, _running(disturbed, its), its))
    rows.append(_row("all", disturbed, struck))
    complaints = [
        f"{asks[heard.ask_index]}: {heard.error or heard.difference}"
        for heard in [*undisturbed, *disturbed]
        if heard.error or heard.difference
    ]
    complaints += [
        f"{asks[heard.ask_index]}: its connection broke, and nobody had broken it: {one.reason}"
        for heard in [*undisturbed, *disturbed]
        for one in heard.answer.breaks
        if not _is_due(one.at_s, struck)
    ]
    complaints += [
        f"{one.fault.value} of {one.victim}: not fully replicated again"
        for one in struck
        if one.whole_s is None
    ]
    return Report(tuple(rows), tuple(complaints))


def _is_due(broke_at_s: float, struck: Sequence[Struck]) -> bool:
    """Whether a connection may have broken then: other deaths shall not be seen by clients."""
    for one in struck:
        healed_s = float("inf") if one.whole_s is None else one.whole_s
        if one.fault in BREAKING and one.began_s <= broke_at_s <= healed_s + SHOWS_WITHIN_S:
            return True
    return False


def _running(heard: Sequence[Heard], struck: Sequence[Struck]) -> list[Heard]:
    """What ran between a fault's beginning and full replication."""
    spans = [(s.began_s, s.ended_s if s.whole_s is None else s.whole_s) for s in struck]
    return [one for one in heard if any(one.was_running(*span) for span in spans)]


def _row(name: str, heard: Sequence[Heard], struck: Sequence[Struck]) -> Row:
    hit = [one for one in heard if any(one.was_running(s.began_s, s.ended_s) for s in struck)]
    stalls_s = (
        [max(one.stall_s(s.began_s, s.ended_s + SHOWS_WITHIN_S) for s in struck) for one in hit]
        if struck
        else [one.stall_s() for one in heard]
    )
    first_tokens_s = [one.first_token_s for one in (hit if struck else heard)]
    recoveries = [s.recovery_s for s in struck]
    return Row(
        name=name,
        count=len(struck),
        num_requests=len(heard),
        num_failed=sum(bool(one.error) for one in heard),
        num_differing=sum(bool(one.difference) for one in heard),
        num_resumed=sum(bool(one.answer.breaks) for one in heard),
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
    """A table for a terminal, and what was wrong below it."""
    heading = (
        f"{'fault':<19} {'times':>5} {'requests':>8} {'failed':>6} {'differing':>9}"
        f" {'resumed':>7} {'hit':>5} {'stall p50':>9} {'p99':>8} {'max':>8} {'first p99':>9}"
        "  full replication after"
    )
    lines = [heading, *(_line(row) for row in report.rows)]
    lines += [
        "",
        "resumed: streams whose connection broke, so that their clients came again; hit: those",
        "that ran while a fault was done; stall: their longest wait between two tokens at that",
        "time; first: the wait for the first token, which shows who had to wait",
    ]
    lines += report.complaints[:MAX_COMPLAINTS]
    left = len(report.complaints) - MAX_COMPLAINTS
    if left > 0:
        lines.append(f"and {left} more")
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
    """The value that so large a share of them does not exceed; 0 where there are none."""
    in_order = sorted(values)
    if not in_order:
        return 0.0
    return in_order[min(len(in_order) - 1, max(0, -int(-share * len(in_order) // 1) - 1))]
