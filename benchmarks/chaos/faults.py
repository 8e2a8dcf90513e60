"""The faults that can be injected into a real cluster, and a random schedule of them. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from milliways.wire.errors import ConfigError


class Fault(Enum):
    """A kind of fault. The seed picks its victim."""

    # Kills a worker: one with experts, one with keys and values, one whose router has requests.
    KILL_EXPERT = "kill-expert"
    KILL_ATTENTION = "kill-attention"
    KILL_ROUTER = "kill-router"
    KILL_CONTROLLER = "kill-controller"
    # Kills a process that clients are connected to. They reconnect, and say how much they have.
    KILL_INGRESS = "kill-ingress"
    KILL_PROXY = "kill-proxy"
    # Stops a worker for some seconds, then resumes it.
    FREEZE = "freeze"
    # Stops and resumes a worker many times, for less than 0.1 s each.
    SLOW = "slow"
    # Files of a worker cannot grow.
    DISK_FULL = "disk-full"
    # Stops a worker until the placement has changed, so that it resumes with an old epoch.
    STALE_EPOCH = "stale-epoch"
    # A worker drops replies; its streams stay open.
    DROP_REPLY = "drop-reply"
    # The files of the checkpoint are damaged while a worker starts: other weights of the same
    # shapes, a bit in each file, files that are cut short, files that are missing.
    SWAP_CHECKPOINT = "swap-checkpoint"
    FLIP_BIT = "flip-bit"
    TRUNCATE = "truncate"
    REMOVE_FILE = "remove-file"
    # Planned changes, which may cut no connection: every replica of the ingress is replaced; there
    # is one replica more for a while, and it leaves again.
    REDEPLOY = "redeploy"
    INGRESS_LEAVES = "ingress-leaves"
    # They end the cluster: it is told to, and finishes what runs; its Ray is gone.
    SIGTERM = "sigterm"
    KILL_RAYLET = "kill-raylet"
    # Cuts the network between some workers and the others.
    PARTITION = "partition"


IMPOSSIBLE = {
    Fault.PARTITION: "one that can be done from outside: the processes of a node share its"
    " loopback interface, which cannot be cut between them; tests/faults does it with two"
    " network namespaces, as root",
}
POSSIBLE = tuple(fault for fault in Fault if fault not in IMPOSSIBLE)
# A worker injects these into itself. It does so only in a cluster that was started for chaos.
INJECTED_BY_WORKER = frozenset({Fault.DROP_REPLY})
# They change files, so they need a cluster with a checkpoint of its own.
DAMAGES_FILES = frozenset(
    {Fault.SWAP_CHECKPOINT, Fault.FLIP_BIT, Fault.TRUNCATE, Fault.REMOVE_FILE}
)
# Each of them ends a cluster of its own, which this run started.
ENDS_CLUSTER = frozenset({Fault.SIGTERM, Fault.KILL_RAYLET})
# No process is left that could answer the requests that ran.
LOSES_REQUESTS = frozenset({Fault.KILL_RAYLET})
# Clients may lose a connection through these faults, and through no other.
BREAKS_CONNECTIONS = frozenset({Fault.KILL_INGRESS, Fault.KILL_PROXY})
# A new worker replaces the killed one, and has to load its shards.
KILLS_WORKER = frozenset(
    {Fault.KILL_EXPERT, Fault.KILL_ATTENTION, Fault.KILL_ROUTER, Fault.STALE_EPOCH} | DAMAGES_FILES
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """A fault to inject.

    It is injected `pause_s` after the cluster recovered from the last one. If it pauses a process,
    it lasts `length_s`. `draw` chooses among the possible victims.
    """

    fault: Fault
    pause_s: float
    length_s: float
    draw: int


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Faults from `kill-expert,freeze`.

    Raises:
        ConfigError: a name is unknown, or `milliways chaos` cannot inject the fault.
    """
    faults: list[Fault] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        try:
            fault = Fault(name)
        except ValueError:
            known = ", ".join(fault.value for fault in Fault)
            raise ConfigError("--faults", name, f"one of {known}") from None
        if fault in IMPOSSIBLE:
            raise ConfigError("--faults", name, IMPOSSIBLE[fault])
        faults.append(fault)
    if not faults:
        raise ConfigError("--faults", text, "at least one fault")
    return tuple(faults)


def plan_faults(faults: Sequence[Fault], seed: int) -> Iterator[PlannedFault]:
    """An endless schedule: all faults in a random order, then all in another order."""
    random = Random(seed)
    while True:
        for fault in random.sample(faults, len(faults)):
            yield PlannedFault(
                fault=fault,
                pause_s=random.uniform(0.5, 2.5),
                length_s=random.uniform(1.0, 5.0),
                draw=random.randrange(1 << 30),
            )
