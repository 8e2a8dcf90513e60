"""What the faults did to the clients: counts, stalls, a table. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.chaos.answers import Answer, Heard, difference
from cluster.chaos.asks import Ask
from cluster.chaos.faults import Fault

MAX_COMPLAINTS = 20


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
    # Of the streams that ran while the fault was being done.
    stalls_s: tuple[float, ...]
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


def make_report(
    asks: Sequence[Ask],
    undisturbed: Sequence[Heard],
    disturbed: Sequence[Heard],
    struck: Sequence[Struck],
) -> Report:
    """Compares every answer with that of the undisturbed run."""
    wanted = {heard.ask_index: heard.answer for heard in undisturbed}
    wrong = {id(heard): _difference(wanted, heard) for heard in disturbed}
    rows = [_row("none (undisturbed)", undisturbed, {}, ())]
    for fault in Fault:
        its = [one for one in struck if one.fault is fault]
        if its:
            rows.append(_row(fault.value, _running(disturbed, its), wrong, its))
    rows.append(_row("all", disturbed, wrong, struck))
    complaints = [
        f"{asks[heard.ask_index]}: {heard.error or wrong.get(id(heard), '')}"
        for heard in [*undisturbed, *disturbed]
        if heard.error or wrong.get(id(heard))
    ]
    complaints += [
        f"{one.fault.value} of {one.victim}: not fully replicated again"
        for one in struck
        if one.whole_s is None
    ]
    return Report(tuple(rows), tuple(complaints))


def _difference(wanted: dict[int, Answer], heard: Heard) -> str:
    if heard.error or heard.ask_index not in wanted:
        return ""
    return difference(wanted[heard.ask_index], heard.answer)


def _running(heard: Sequence[Heard], struck: Sequence[Struck]) -> list[Heard]:
    """What ran between a fault's beginning and full replication."""
    spans = [(s.began_s, s.ended_s if s.whole_s is None else s.whole_s) for s in struck]
    return [one for one in heard if any(one.was_running(*span) for span in spans)]


def _row(name: str, heard: Sequence[Heard], wrong: dict[int, str], struck: Sequence[Struck]) -> Row:
    hit = [
        one
        for one in heard
        if not struck or any(one.was_running(s.began_s, s.ended_s) for s in struck)
    ]
    recoveries = [s.recovery_s for s in struck]
    return Row(
        name=name,
        count=len(struck),
        num_requests=len(heard),
        num_failed=sum(bool(one.error) for one in heard),
        num_differing=sum(bool(wrong.get(id(one))) for one in heard),
        stalls_s=tuple(one.stall_s for one in hit),
        recoveries_s=tuple(r for r in recoveries if r is not None),
        num_not_recovered=sum(r is None for r in recoveries),
    )


def format_report(report: Report) -> str:
    """A table for a terminal, and what was wrong below it."""
    heading = (
        f"{'fault':<19} {'times':>5} {'requests':>8} {'failed':>6} {'differing':>9}"
        f" {'hit':>5} {'stall p50':>9} {'p99':>8} {'max':>8}  full replication after"
    )
    lines = [heading, *(_line(row) for row in report.rows)]
    lines += ["", "stall: the longest wait for a token in a stream that ran during the fault"]
    lines += report.complaints[:MAX_COMPLAINTS]
    left = len(report.complaints) - MAX_COMPLAINTS
    if left > 0:
        lines.append(f"and {left} more")
    lines.append("the promise holds" if report.holds else "THE PROMISE IS BROKEN")
    return "\n".join(lines)


def _line(row: Row) -> str:
    stalls = [_milliseconds(percentile(row.stalls_s, share)) for share in (0.5, 0.99, 1.0)]
    recovery = ""
    if row.recoveries_s:
        middle, longest = percentile(row.recoveries_s, 0.5), max(row.recoveries_s)
        recovery = f"{middle:.1f} s, at most {longest:.1f} s"
    if row.num_not_recovered:
        recovery += f" ({row.num_not_recovered} not)"
    return (
        f"{row.name:<19} {row.count or '-':>5} {row.num_requests:>8} {row.num_failed:>6}"
        f" {row.num_differing:>9} {len(row.stalls_s):>5} {stalls[0]:>9} {stalls[1]:>8}"
        f" {stalls[2]:>8}  {recovery}"
    ).rstrip()


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def percentile(values: Iterable[float], share: float) -> float:
    """The value that so large a share of them does not exceed; 0 where there are none."""
    in_order = sorted(values)
    if not in_order:
        return 0.0
    return in_order[min(len(in_order) - 1, max(0, -int(-share * len(in_order) // 1) - 1))]
