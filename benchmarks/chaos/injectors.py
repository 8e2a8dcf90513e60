"""Does faults to processes, and tells when each began and ended.

What stands still is always woken, what is limited always freed, also where a run is interrupted.
"""

import signal
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from milliways.benchmarks.chaos.faults import Fault, Strike
from milliways.benchmarks.chaos.victims import Place, WorkerFacts, choose
from milliways.wire.errors import StartupError
from milliways.wire.view import ClusterView

SLOW_STOPPED_S = 0.08
SLOW_RUNNING_S = 0.04
EPOCH_TIMEOUT_S = 30.0
MOST_DROPPED = 4


class Actuator(Protocol):
    """Reaches the processes of a cluster, wherever they are."""

    def workers(self) -> Sequence[WorkerFacts]:
        """Those that are ready."""
        ...

    def controller(self) -> Place: ...

    def ingress(self) -> Sequence[Place]:
        """Replicas of the ingress that serve."""
        ...

    def proxies(self) -> Sequence[Place]:
        """Proxies that pass HTTP on to them."""
        ...

    def view(self) -> ClusterView:
        """The controller's newest."""
        ...

    def send(self, place: Place, number: signal.Signals) -> None:
        """Signals a process; without effect where it is gone."""
        ...

    def drop_replies(self, place: Place, count: int) -> int:
        """Has a worker lose its next answers to others; how many it had to answer and lost.

        Raises:
            StartupError: it does not do so.
        """
        ...

    def limit_files(self, place: Place, max_bytes: int | None) -> None:
        """No file of a process may grow beyond so much; None lifts the limit."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A fault as it was done."""

    victim: str
    began_s: float
    ended_s: float
    # Who ended by it, where it was one.
    killed: Place | None = None


def inject(strike: Strike, hands: Actuator) -> Done:
    """Does one fault, from its beginning to its end.

    Raises:
        StartupError: there is nobody whom it could hit.
    """
    match strike.fault:
        case Fault.KILL_CONTROLLER:
            return _kill(hands.controller(), hands)
        case Fault.KILL_INGRESS:
            return _kill(_any(strike, hands.ingress()), hands)
        case Fault.KILL_PROXY:
            return _kill(_any(strike, hands.proxies()), hands)
        case Fault.KILL_EXPERT | Fault.KILL_ATTENTION | Fault.KILL_ROUTER:
            return _kill(_victim(strike, hands.workers()), hands)
        case Fault.FREEZE:
            return _freeze(strike, hands)
        case Fault.SLOW:
            return _slow(strike, hands)
        case Fault.DISK_FULL:
            return _fill_disk(strike, hands)
        case Fault.STALE_EPOCH:
            return _sleep_through(strike, hands)
        case Fault.DROP_REPLY:
            return _drop_replies(strike, hands)
        case Fault.PARTITION:
            raise AssertionError("refused when the command line was read")


def _victim(strike: Strike, workers: Sequence[WorkerFacts]) -> Place:
    place = choose(strike.fault, workers, strike.draw)
    if place is None:
        raise StartupError(f"{strike.fault.value}: no worker is ready that it could hit")
    return place


def _any(strike: Strike, places: Sequence[Place]) -> Place:
    if not places:
        raise StartupError(f"{strike.fault.value}: nobody serves whom it could hit")
    return sorted(places, key=lambda place: place.name)[strike.draw % len(places)]


def _kill(place: Place, hands: Actuator) -> Done:
    now_s = time.monotonic()
    hands.send(place, signal.SIGKILL)
    return Done(place.name, now_s, time.monotonic(), place)


def _freeze(strike: Strike, hands: Actuator) -> Done:
    place = _victim(strike, hands.workers())
    began_s = time.monotonic()
    with _stopped(place, hands):
        time.sleep(strike.length_s)
    return Done(place.name, began_s, time.monotonic())


def _slow(strike: Strike, hands: Actuator) -> Done:
    place = _victim(strike, hands.workers())
    began_s = time.monotonic()
    while time.monotonic() < began_s + strike.length_s:
        with _stopped(place, hands):
            time.sleep(SLOW_STOPPED_S)
        time.sleep(SLOW_RUNNING_S)
    return Done(place.name, began_s, time.monotonic())


def _fill_disk(strike: Strike, hands: Actuator) -> Done:
    place = _victim(strike, hands.workers())
    began_s = time.monotonic()
    hands.limit_files(place, 0)
    try:
        time.sleep(strike.length_s)
    finally:
        hands.limit_files(place, None)
    return Done(place.name, began_s, time.monotonic())


def _drop_replies(strike: Strike, hands: Actuator) -> Done:
    place = _victim(strike, hands.workers())
    began_s = time.monotonic()
    num_lost = hands.drop_replies(place, 1 + strike.draw % MOST_DROPPED)
    return Done(f"{place.name}, {num_lost} times", began_s, time.monotonic())


def _sleep_through(strike: Strike, hands: Actuator) -> Done:
    """One worker stands still while another dies, and wakes up under another epoch."""
    workers = hands.workers()
    sleeper = _victim(strike, workers)
    others = [worker for worker in workers if worker.place != sleeper]
    killed = _victim(strike, others)
    epoch = hands.view().placement_epoch
    began_s = time.monotonic()
    with _stopped(sleeper, hands):
        hands.send(killed, signal.SIGKILL)
        _wait_for_epoch(hands, epoch)
    names = f"{sleeper.name} asleep, {killed.name} killed"
    return Done(names, began_s, time.monotonic())


def _wait_for_epoch(hands: Actuator, epoch: int) -> None:
    until_s = time.monotonic() + EPOCH_TIMEOUT_S
    while hands.view().placement_epoch <= epoch and time.monotonic() < until_s:
        time.sleep(0.02)


@contextmanager
def _stopped(place: Place, hands: Actuator) -> Generator[None]:
    hands.send(place, signal.SIGSTOP)
    try:
        yield
    finally:
        hands.send(place, signal.SIGCONT)
