"""What can be done to a real cluster from outside, and when: drawn from a seed. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from milliways.wire.errors import ConfigError


class Fault(Enum):
    """One thing that goes wrong, to somebody that a seed picks."""

    # A process ends: one that computes experts, one that holds keys and values, one with requests.
    KILL_EXPERT = "kill-expert"
    KILL_ATTENTION = "kill-attention"
    KILL_ROUTER = "kill-router"
    KILL_CONTROLLER = "kill-controller"
    # A process ends that clients are connected to: they come again, and say how much they had.
    KILL_INGRESS = "kill-ingress"
    KILL_PROXY = "kill-proxy"
    # A process stands still for seconds, then wakes up as if nothing had been.
    FREEZE = "freeze"
    # A process stands still for moments, again and again.
    SLOW = "slow"
    # No file of a worker can grow any more.
    DISK_FULL = "disk-full"
    # A worker sleeps through a change of the placement.
    STALE_EPOCH = "stale-epoch"
    # A reply is lost although the stream stands.
    DROP_REPLY = "drop-reply"
    # A network comes apart.
    PARTITION = "partition"


NOT_FROM_OUTSIDE = {
    Fault.PARTITION: "one that can be done from outside: the processes of a node share its"
    " loopback interface, which cannot be cut between them; tests/faults does it with two"
    " network namespaces, as root",
}
POSSIBLE = tuple(fault for fault in Fault if fault not in NOT_FROM_OUTSIDE)
# Which a worker does to itself, where its cluster was started to be broken.
FROM_WITHIN = frozenset({Fault.DROP_REPLY})
# Which break connections of clients. Nothing else may.
BREAKING = frozenset({Fault.KILL_INGRESS, Fault.KILL_PROXY})
# Which end with a new process, that has to load its shards.
DEADLY = frozenset({Fault.KILL_EXPERT, Fault.KILL_ATTENTION, Fault.KILL_ROUTER, Fault.STALE_EPOCH})


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault, how long after all was well it comes, and what decides whom it hits."""

    fault: Fault
    pause_s: float
    length_s: float
    draw: int


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Faults from `kill-expert,freeze`.

    Raises:
        ConfigError: there is no such fault, or it cannot be done to a cluster from outside.
    """
    faults: list[Fault] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        try:
            fault = Fault(name)
        except ValueError:
            known = ", ".join(fault.value for fault in Fault)
            raise ConfigError("--faults", name, f"one of {known}") from None
        if fault in NOT_FROM_OUTSIDE:
            raise ConfigError("--faults", name, NOT_FROM_OUTSIDE[fault])
        faults.append(fault)
    if not faults:
        raise ConfigError("--faults", text, "at least one fault")
    return tuple(faults)


def strikes(faults: Sequence[Fault], seed: int) -> Iterator[Strike]:
    """Faults without end: all of them in some order, then all in another."""
    random = Random(seed)
    while True:
        for fault in random.sample(faults, len(faults)):
            yield Strike(
                fault=fault,
                pause_s=random.uniform(0.5, 2.5),
                length_s=random.uniform(1.0, 5.0),
                draw=random.randrange(1 << 30),
            )
