"""One run from its beginning to its end: the undisturbed answers, faults under load, a report.

1. Every request once, with nobody disturbing: these are the answers to hold the cluster to.
2. Clients ask the same over and over. After a pause one fault is done, and when the cluster is as
   replicated as before, the next, until every kind had its turn and the time is over. Or one is
   done every so many seconds, whatever became of the last.
3. What was begun is answered to its end, and compared.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from milliways.benchmarks.chaos.asks import Ask
from milliways.benchmarks.chaos.faults import DEADLY, Fault, Strike, strikes
from milliways.benchmarks.chaos.injectors import Actuator, Done, inject
from milliways.benchmarks.chaos.load import Load
from milliways.benchmarks.chaos.report import Report, Struck, make_report
from milliways.benchmarks.chaos.victims import Wholeness
from milliways.wire.errors import ClusterError, StartupError

WHOLE_TIMEOUT_S = 240.0
POLL_S = 0.1
NOTICED_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run shall do."""

    faults: tuple[Fault, ...]
    seed: int
    duration_s: float
    # How long from one fault to the next; None: until all is as replicated as before.
    every_s: float | None = None


class Trial:
    """Owns one run against one cluster."""

    def __init__(
        self, asks: Sequence[Ask], load: Load, hands: Actuator, say: Callable[[str], None]
    ) -> None:
        self._asks = asks
        self._load = load
        self._hands = hands
        self._say = say
        self._struck: list[Struck] = []

    def run(self, plan: Plan) -> Report:
        """Takes the time of the plan, and what the last fault needs to heal."""
        hands = self._hands
        whole = Wholeness.of(hands.view(), hands.ingress(), hands.proxies())
        self._say(f"{len(self._asks)} requests, undisturbed …")
        undisturbed = self._load.run_once()
        self._say("the same under faults …")
        self._load.start({heard.ask_index: heard.answer for heard in undisturbed})
        problem = ""
        try:
            if plan.every_s is None:
                self._strike_all(plan, whole)
            else:
                self._strike_steadily(plan, plan.every_s, whole)
        except ClusterError as error:
            problem = f"faults could not be done: {error}"
        finally:
            disturbed = self._load.stop()
        report = make_report(self._asks, undisturbed, disturbed, self._struck)
        if problem:
            report = Report(report.rows, (problem, *report.complaints))
        return report

    def _strike_all(self, plan: Plan, whole: Wholeness) -> None:
        until_s = time.monotonic() + plan.duration_s
        missing = set(plan.faults)
        for strike in strikes(plan.faults, plan.seed):
            if not missing and time.monotonic() > until_s:
                return
            time.sleep(strike.pause_s)
            struck = self._strike(strike, whole)
            self._struck.append(struck)
            missing.discard(strike.fault)
            self._say(_sentence(struck))
            if struck.whole_s is None:
                return

    def _strike_steadily(self, plan: Plan, every_s: float, whole: Wholeness) -> None:
        """A fault whenever it is time. All those before are made good when all is whole again."""
        began_s = time.monotonic()
        for number, strike in enumerate(strikes(plan.faults, plan.seed)):
            due_s = began_s + (number + 1) * every_s
            is_last = due_s > began_s + plan.duration_s
            until_s = time.monotonic() + WHOLE_TIMEOUT_S if is_last else due_s
            whole_s = self._watch(whole, until_s, is_last=is_last)
            if whole_s is not None:
                self._made_good(whole_s)
            if is_last:
                return
            try:
                done = inject(strike, self._hands)
            except StartupError as error:
                # Nobody is ready whom it could hit, so soon after the last.
                self._say(str(error))
                continue
            self._struck.append(
                Struck(
                    fault=strike.fault,
                    victim=done.victim,
                    began_s=done.began_s,
                    ended_s=done.ended_s,
                    whole_s=None,
                )
            )

    def _made_good(self, whole_s: float) -> None:
        self._struck = [
            replace(one, whole_s=whole_s) if one.whole_s is None else one for one in self._struck
        ]
        self._say(f"{len(self._struck)} faults, fully replicated again")

    def _watch(self, whole: Wholeness, until_s: float, *, is_last: bool) -> float | None:
        """When all was replicated for the first time; takes all of the time but for the last."""
        whole_s: float | None = None
        # What was just done is not noticed at once.
        time.sleep(NOTICED_AFTER_S)
        while time.monotonic() < until_s and not (is_last and whole_s is not None):
            if whole_s is None and self._is_whole(whole):
                whole_s = time.monotonic()
            time.sleep(POLL_S)
        return whole_s

    def _is_whole(self, whole: Wholeness) -> bool:
        hands = self._hands
        return whole.is_in(hands.view()) and whole.has_doors(hands.ingress(), hands.proxies())

    def _strike(self, strike: Strike, whole: Wholeness) -> Struck:
        epoch = self._hands.view().placement_epoch
        done = inject(strike, self._hands)
        return Struck(
            fault=strike.fault,
            victim=done.victim,
            began_s=done.began_s,
            ended_s=done.ended_s,
            whole_s=self._when_whole(strike.fault, done, whole, epoch),
        )

    def _when_whole(self, fault: Fault, done: Done, whole: Wholeness, epoch: int) -> float | None:
        """When all is replicated again; None where it is not in time."""
        until_s = time.monotonic() + WHOLE_TIMEOUT_S
        while time.monotonic() < until_s:
            # Before the death is noticed, all looks well.
            if self._is_noticed(fault, done, epoch) and self._is_whole(whole):
                return time.monotonic()
            time.sleep(POLL_S)
        return None

    def _is_noticed(self, fault: Fault, done: Done, epoch: int) -> bool:
        hands = self._hands
        match fault:
            case Fault.KILL_CONTROLLER:
                # It is asked by its name, so what has died never answers for its successor.
                return hands.controller() != done.killed
            case Fault.KILL_INGRESS:
                return done.killed not in hands.ingress()
            case Fault.KILL_PROXY:
                return done.killed not in hands.proxies()
            case _:
                return fault not in DEADLY or hands.view().placement_epoch > epoch


def _sentence(struck: Struck) -> str:
    recovery = "NOT" if struck.recovery_s is None else f"{struck.recovery_s:.1f} s"
    return f"{struck.fault.value:<15} {struck.victim}: fully replicated again after {recovery}"
