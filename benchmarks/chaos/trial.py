"""One run: collects undisturbed answers, injects faults under load, and makes a report.

1. The load sends every request once, without faults. These answers are the wanted ones.
2. Clients send the same requests again and again. A fault is injected, then the run waits for full
   replication and for a short pause before the next fault. It ends when every kind of fault was
   injected and the time is over. With `Plan.every_s`, faults come at fixed intervals instead, and
   the run does not wait for replication.
3. The requests that still run get their answers, and all answers are compared.

Faults that end a cluster come later, each on a cluster of its own (`endings`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from milliways.benchmarks.chaos.answers import Outcome
from milliways.benchmarks.chaos.faults import KILLS_WORKER, Fault, PlannedFault, plan_faults
from milliways.benchmarks.chaos.injectors import Actuator, Injection, inject
from milliways.benchmarks.chaos.load import Load
from milliways.benchmarks.chaos.report import FaultRecord
from milliways.benchmarks.chaos.requests import ChaosRequest
from milliways.benchmarks.chaos.victims import Replication
from milliways.wire.errors import ClusterError, StartupError

RESTORE_TIMEOUT_S = 240.0
POLL_S = 0.1
NOTICED_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which faults a run injects, and for how long."""

    faults: tuple[Fault, ...]
    seed: int
    duration_s: float
    # Seconds between two faults; None: inject the next one after full replication.
    every_s: float | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """What clients of one cluster heard, and what was done to it meanwhile."""

    undisturbed: tuple[Outcome, ...]
    disturbed: tuple[Outcome, ...]
    records: tuple[FaultRecord, ...]
    # Why the run ended early; otherwise empty.
    problem: str = ""


class Trial:
    """Owns one run against one cluster.

    Invariant: `_records` has the faults injected so far, in order. Those that the cluster has not
    recovered from yet are its last ones; their `restored_s` is None.
    """

    def __init__(
        self,
        requests: Sequence[ChaosRequest],
        load: Load,
        actuator: Actuator,
        say: Callable[[str], None],
    ) -> None:
        self._requests = requests
        self._load = load
        self._actuator = actuator
        self._say = say
        self._records: list[FaultRecord] = []

    def run(self, plan: Plan) -> Heard:
        """Runs the plan. Takes `plan.duration_s` and the time to recover from the last fault."""
        actuator = self._actuator
        baseline = Replication.of(actuator.view(), actuator.ingress(), actuator.proxies())
        self._say(f"{len(self._requests)} requests, undisturbed …")
        undisturbed = self._load.run_once()
        self._say("the same under faults …")
        self._load.start({outcome.request_index: outcome.answer for outcome in undisturbed})
        problem = ""
        try:
            if plan.every_s is None:
                self._run_in_turn(plan, baseline)
            else:
                self._run_on_schedule(plan, plan.every_s, baseline)
        except ClusterError as error:
            problem = f"a fault could not be injected: {error}"
        finally:
            disturbed = self._load.stop()
        return Heard(tuple(undisturbed), tuple(disturbed), tuple(self._records), problem)

    def _run_in_turn(self, plan: Plan, baseline: Replication) -> None:
        until_s = time.monotonic() + plan.duration_s
        missing = set(plan.faults)
        for planned in plan_faults(plan.faults, plan.seed):
            if not missing and time.monotonic() > until_s:
                return
            time.sleep(planned.pause_s)
            record = self._inject_and_wait(planned, baseline)
            self._records.append(record)
            missing.discard(planned.fault)
            self._say(_sentence(record))
            if record.restored_s is None:
                return

    def _run_on_schedule(self, plan: Plan, every_s: float, baseline: Replication) -> None:
        """Injects faults at fixed intervals. Full replication restores all faults before it."""
        began_s = time.monotonic()
        for number, planned in enumerate(plan_faults(plan.faults, plan.seed)):
            due_s = began_s + (number + 1) * every_s
            is_last = due_s > began_s + plan.duration_s
            until_s = time.monotonic() + RESTORE_TIMEOUT_S if is_last else due_s
            restored_s = self._wait_for_replication(baseline, until_s, is_last=is_last)
            if restored_s is not None:
                self._mark_restored(restored_s)
            if is_last:
                return
            try:
                injection = inject(planned, self._actuator)
            except StartupError as error:
                # So soon after the last fault no ready process fits as the victim.
                self._say(str(error))
                continue
            self._records.append(
                FaultRecord(
                    fault=planned.fault,
                    victim=injection.victim,
                    began_s=injection.began_s,
                    ended_s=injection.ended_s,
                    restored_s=None,
                )
            )

    def _mark_restored(self, restored_s: float) -> None:
        self._records = [
            replace(one, restored_s=restored_s) if one.restored_s is None else one
            for one in self._records
        ]
        self._say(f"{len(self._records)} faults so far; fully replicated again")

    def _wait_for_replication(
        self, baseline: Replication, until_s: float, *, is_last: bool
    ) -> float | None:
        """Waits until `until_s`; returns when all was first fully replicated, or None.

        After the last fault it returns as soon as all is fully replicated.
        """
        restored_s: float | None = None
        # The cluster needs a moment to notice the last fault.
        time.sleep(NOTICED_AFTER_S)
        while time.monotonic() < until_s and not (is_last and restored_s is not None):
            if restored_s is None and self._is_restored(baseline):
                restored_s = time.monotonic()
            time.sleep(POLL_S)
        return restored_s

    def _is_restored(self, baseline: Replication) -> bool:
        actuator = self._actuator
        return baseline.holds_in(actuator.view()) and baseline.serves_as_before(
            actuator.ingress(), actuator.proxies()
        )

    def _inject_and_wait(self, planned: PlannedFault, baseline: Replication) -> FaultRecord:
        epoch = self._actuator.view().placement_epoch
        injection = inject(planned, self._actuator)
        return FaultRecord(
            fault=planned.fault,
            victim=injection.victim,
            began_s=injection.began_s,
            ended_s=injection.ended_s,
            restored_s=self._wait_until_restored(planned.fault, injection, baseline, epoch),
        )

    def _wait_until_restored(
        self, fault: Fault, injection: Injection, baseline: Replication, epoch: int
    ) -> float | None:
        """The time of full replication after the fault; None if that took longer than the limit."""
        until_s = time.monotonic() + RESTORE_TIMEOUT_S
        while time.monotonic() < until_s:
            # Until the cluster notices a death, its view still looks complete.
            if self._is_noticed(fault, injection, epoch) and self._is_restored(baseline):
                return time.monotonic()
            time.sleep(POLL_S)
        return None

    def _is_noticed(self, fault: Fault, injection: Injection, epoch: int) -> bool:
        actuator = self._actuator
        match fault:
            case Fault.KILL_CONTROLLER:
                # The controller is found by name: a dead one never answers for its successor.
                return actuator.controller() != injection.killed
            case Fault.KILL_INGRESS:
                return injection.killed not in actuator.ingress()
            case Fault.KILL_PROXY:
                return injection.killed not in actuator.proxies()
            case _:
                return fault not in KILLS_WORKER or actuator.view().placement_epoch > epoch


def _sentence(record: FaultRecord) -> str:
    recovery = "NOT" if record.recovery_s is None else f"{record.recovery_s:.1f} s"
    return f"{record.fault.value:<15} {record.victim}: fully replicated again after {recovery}"
