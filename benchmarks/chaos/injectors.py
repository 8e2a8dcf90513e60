"""Injects faults into processes, and reports when each began and ended.

A stopped process is always resumed and a limit is always lifted, also when a run is interrupted.
"""

import signal
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from milliways.benchmarks.chaos.disk_faults import damaged
from milliways.benchmarks.chaos.faults import Fault, PlannedFault
from milliways.benchmarks.chaos.victims import Place, WorkerFacts, choose
from milliways.wire.errors import StartupError
from milliways.wire.view import ClusterView

SLOW_STOPPED_S = 0.08
SLOW_RUNNING_S = 0.04
EPOCH_TIMEOUT_S = 30.0
MOST_DROPPED = 4
NOTICE_TIMEOUT_S = 30.0
NOTICE_POLL_S = 0.1


class Actuator(Protocol):
    """Finds the processes of a cluster, and acts on them, on any node."""

    def workers(self) -> Sequence[WorkerFacts]:
        """The workers that are ready."""
        ...

    def controller(self) -> Place: ...

    def ingress(self) -> Sequence[Place]:
        """The ingress replicas that serve."""
        ...

    def proxies(self) -> Sequence[Place]:
        """The HTTP proxies in front of the ingress."""
        ...

    def view(self) -> ClusterView:
        """The controller's newest view."""
        ...

    def send(self, place: Place, number: signal.Signals) -> None:
        """Sends a signal to a process; does nothing if the process is gone."""
        ...

    def drop_replies(self, place: Place, count: int) -> int:
        """Makes a worker drop its next `count` replies; waits for that, within a time limit.

        Returns how many it dropped.

        Raises:
            StartupError: the worker cannot do that.
        """
        ...

    def deploy_ingress(self, num_replicas: int) -> None:
        """Deploys the ingress anew, with this number of replicas; waits until they serve.

        Raises:
            StartupError: they do not come.
        """
        ...

    def ckpt_dir(self) -> Path:
        """The folder of the tensor files, which faults may change."""
        ...

    def file_fault_of(self, place: Place) -> str:
        """What the next incarnation of a worker found wrong with a file; empty if nothing yet."""
        ...

    def limit_files(self, place: Place, max_bytes: int | None) -> None:
        """Limits the size to which files of a process may grow; None lifts the limit."""
        ...


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault that was injected."""

    victim: str
    began_s: float
    ended_s: float
    # The process that the fault killed, for those faults that kill one.
    killed: Place | None = None


def inject(planned: PlannedFault, actuator: Actuator) -> Injection:
    """Injects one fault; returns when the fault is over.

    Raises:
        StartupError: no process fits as its victim.
    """
    match planned.fault:
        case Fault.KILL_CONTROLLER:
            return _kill(actuator.controller(), actuator)
        case Fault.KILL_INGRESS:
            return _kill(_any(planned, actuator.ingress()), actuator)
        case Fault.KILL_PROXY:
            return _kill(_any(planned, actuator.proxies()), actuator)
        case Fault.KILL_EXPERT | Fault.KILL_ATTENTION | Fault.KILL_ROUTER:
            return _kill(_victim(planned, actuator.workers()), actuator)
        case Fault.FREEZE:
            return _freeze(planned, actuator)
        case Fault.SLOW:
            return _slow(planned, actuator)
        case Fault.DISK_FULL:
            return _fill_disk(planned, actuator)
        case Fault.STALE_EPOCH:
            return _sleep_through(planned, actuator)
        case Fault.DROP_REPLY:
            return _drop_replies(planned, actuator)
        case Fault.SWAP_CHECKPOINT | Fault.FLIP_BIT | Fault.TRUNCATE | Fault.REMOVE_FILE:
            return _damage_files(planned, actuator)
        case Fault.REDEPLOY:
            return _change_ingress(actuator, [0])
        case Fault.INGRESS_LEAVES:
            return _change_ingress(actuator, [1, 0])
        case Fault.SIGTERM | Fault.KILL_RAYLET:
            raise AssertionError("it has a cluster of its own: see `endings`")
        case Fault.PARTITION:
            raise AssertionError("parse_faults refuses it")


def _victim(planned: PlannedFault, workers: Sequence[WorkerFacts]) -> Place:
    place = choose(planned.fault, workers, planned.draw)
    if place is None:
        raise StartupError(f"{planned.fault.value}: no ready worker fits as its victim")
    return place


def _any(planned: PlannedFault, places: Sequence[Place]) -> Place:
    if not places:
        raise StartupError(f"{planned.fault.value}: no process of that kind is serving")
    return sorted(places, key=lambda place: place.name)[planned.draw % len(places)]


def _kill(place: Place, actuator: Actuator) -> Injection:
    now_s = time.monotonic()
    actuator.send(place, signal.SIGKILL)
    return Injection(place.name, now_s, time.monotonic(), place)


def _freeze(planned: PlannedFault, actuator: Actuator) -> Injection:
    place = _victim(planned, actuator.workers())
    began_s = time.monotonic()
    with _stopped(place, actuator):
        time.sleep(planned.length_s)
    return Injection(place.name, began_s, time.monotonic())


def _slow(planned: PlannedFault, actuator: Actuator) -> Injection:
    place = _victim(planned, actuator.workers())
    began_s = time.monotonic()
    while time.monotonic() < began_s + planned.length_s:
        with _stopped(place, actuator):
            time.sleep(SLOW_STOPPED_S)
        time.sleep(SLOW_RUNNING_S)
    return Injection(place.name, began_s, time.monotonic())


def _fill_disk(planned: PlannedFault, actuator: Actuator) -> Injection:
    place = _victim(planned, actuator.workers())
    began_s = time.monotonic()
    actuator.limit_files(place, 0)
    try:
        time.sleep(planned.length_s)
    finally:
        actuator.limit_files(place, None)
    return Injection(place.name, began_s, time.monotonic())


def _drop_replies(planned: PlannedFault, actuator: Actuator) -> Injection:
    place = _victim(planned, actuator.workers())
    began_s = time.monotonic()
    num_lost = actuator.drop_replies(place, 1 + planned.draw % MOST_DROPPED)
    return Injection(f"{place.name}, {num_lost} times", began_s, time.monotonic())


def _damage_files(planned: PlannedFault, actuator: Actuator) -> Injection:
    """Kills a worker while files are damaged, until it has noticed and for a while longer."""
    place = _victim(planned, actuator.workers())
    began_s = time.monotonic()
    with damaged(planned.fault, actuator.ckpt_dir(), planned.draw):
        actuator.send(place, signal.SIGKILL)
        until_s = began_s + NOTICE_TIMEOUT_S
        while not (said := actuator.file_fault_of(place)) and time.monotonic() < until_s:
            time.sleep(NOTICE_POLL_S)
        time.sleep(planned.length_s)
    end = "noticed" if said else "did not need the files"
    return Injection(f"{place.name}, which {end}", began_s, time.monotonic(), place)


def _change_ingress(actuator: Actuator, num_more: Sequence[int]) -> Injection:
    """Deploys the ingress again and again, each time with so many replicas more than at first."""
    began_s = time.monotonic()
    num_replicas = len(actuator.ingress())
    for number in num_more:
        actuator.deploy_ingress(num_replicas + number)
    return Injection("the ingress", began_s, time.monotonic())


def _sleep_through(planned: PlannedFault, actuator: Actuator) -> Injection:
    """Stops one worker, kills another, and resumes the first after the epoch has changed."""
    workers = actuator.workers()
    sleeper = _victim(planned, workers)
    others = [worker for worker in workers if worker.place != sleeper]
    killed = _victim(planned, others)
    epoch = actuator.view().placement_epoch
    began_s = time.monotonic()
    with _stopped(sleeper, actuator):
        actuator.send(killed, signal.SIGKILL)
        _wait_for_epoch(actuator, epoch)
    names = f"{sleeper.name} asleep, {killed.name} killed"
    return Injection(names, began_s, time.monotonic())


def _wait_for_epoch(actuator: Actuator, epoch: int) -> None:
    until_s = time.monotonic() + EPOCH_TIMEOUT_S
    while actuator.view().placement_epoch <= epoch and time.monotonic() < until_s:
        time.sleep(0.02)


@contextmanager
def _stopped(place: Place, actuator: Actuator) -> Generator[None]:
    actuator.send(place, signal.SIGSTOP)
    try:
        yield
    finally:
        actuator.send(place, signal.SIGCONT)
