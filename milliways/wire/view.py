"""What the controller publishes: which workers are in the cluster, and what each holds.

A view is a value with a version, the placement epoch. Routers act on the newest view that they have
received; workers refuse calls that act on an older view than theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from milliways.model.manifest import EMPTY_MANIFEST, Manifest
from milliways.wire.placement import AttentionRange, ExpertId, ModelBytes


class WorkerState(Enum):
    """LOADING -> READY -> DRAINING -> STOPPED. A worker whose process died is LOST.

    A lost worker is LOADING again with its next incarnation, or STOPPED if it was to leave.
    """

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    LOST = "lost"


WORKER_MOVES: dict[WorkerState, set[WorkerState]] = {
    WorkerState.LOADING: {WorkerState.READY, WorkerState.STOPPED, WorkerState.LOST},
    WorkerState.READY: {WorkerState.DRAINING, WorkerState.STOPPED, WorkerState.LOST},
    WorkerState.DRAINING: {WorkerState.STOPPED, WorkerState.LOST},
    WorkerState.STOPPED: set(),
    WorkerState.LOST: {WorkerState.LOADING, WorkerState.STOPPED},
}


def moved(state: WorkerState, to: WorkerState) -> WorkerState:
    """The new state of a worker; a move that `WORKER_MOVES` does not have is a bug of ours."""
    assert to in WORKER_MOVES[state], f"{state} -> {to}"
    return to


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker: its incarnation, where its data plane listens, what it holds."""

    worker_id: str
    incarnation: int
    address: str
    state: WorkerState
    # Where its router takes requests; empty if it has none.
    router_address: str = ""
    node_id: str = ""
    pid: int = 0
    # The layers of its attention shard; none if `num_layers` is 0.
    first_layer: int = 0
    num_layers: int = 0
    has_ends: bool = False
    experts: frozenset[ExpertId] = frozenset()

    @property
    def can_compute(self) -> bool:
        """Whether calls may go to it; a worker that drains still answers."""
        return self.state in (WorkerState.READY, WorkerState.DRAINING)


# Later than any time at which both of two declarations of one moment were made.
_A_MOMENT_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """The settings that are wanted, by name, and when they were declared: the latest ones count.

    `at_s` is in seconds since 1970, 0 for settings that nobody declared.
    """

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    at_s: float = 0.0

    def with_values(self, values: Mapping[str, Any], now_s: float = 0.0) -> "Declared":
        """A later declaration with other values for some names."""
        at_s = max(now_s, self.at_s + _A_MOMENT_S)
        return Declared(values={**self.values, **values}, at_s=at_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """All members under one placement epoch, and the chain of shards of each router's sequences.

    `chains` maps a router's worker_id to the workers that its sequences run through, in the order
    of layers; if attention is replicated, that is the worker itself.
    """

    placement_epoch: int
    members: Mapping[str, Member]
    # The number of the workers' generation; epochs of different generations do not compare.
    generation: int = 1
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    # The bytes of the model that is served, and whether all of its parts are known.
    manifest: Manifest = EMPTY_MANIFEST
    manifest_is_whole: bool = False
    # Sizes of the model, so that a new controller need not read its files; None at first.
    model: ModelBytes | None = None
    # So that the next controller and every ingress know it, whoever dies.
    declared: Declared = field(default_factory=Declared)

    def holders(self, expert_id: ExpertId) -> tuple[Member, ...]:
        """Members that can compute an expert now, in the order of their ids."""
        return tuple(
            member
            for _, member in sorted(self.members.items())
            if member.can_compute and expert_id in member.experts
        )

    def routers(self) -> tuple[Member, ...]:
        """Members that take requests: ready, with a chain whose shards can all compute."""
        return tuple(
            self.members[worker_id]
            for worker_id, chain in sorted(self.chains.items())
            if self.members[worker_id].state is WorkerState.READY
            and all(self.members[link].can_compute for link in chain)
        )

    def standbys(self, worker_id: str) -> tuple[Member, ...]:
        """The routers to which a router may send copies of its KV blocks, best first.

        Both must hold all layers themselves, and the standby must take requests. Routers on other
        nodes are taken if there are any. The order is rotated by the router's own place, so that
        not all prefer the same standby.
        """
        if self.chains.get(worker_id) != (worker_id,):
            return ()
        others = [
            member
            for member in self.routers()
            if member.worker_id != worker_id and len(self.chains[member.worker_id]) == 1
        ]
        node_id = self.members[worker_id].node_id
        elsewhere = [member for member in others if member.node_id != node_id]
        others = elsewhere or others
        if not others:
            return ()
        first = sorted(self.chains).index(worker_id) % len(others)
        return (*others[first:], *others[:first])


# What is known before any view: of no generation.
EMPTY_VIEW = ClusterView(placement_epoch=0, members={}, generation=0)


def chains_of(
    attention: Mapping[str, AttentionRange], num_layers: int
) -> dict[str, tuple[str, ...]]:
    """The chains of a placement, by the worker_id of their router.

    Each worker with all attention layers has a router of its own. If there is none, one router runs
    the chain of all ranges; it is on the worker with the output head, where tokens enter and leave.
    `attention` is by worker_id. While the ranges do not have all layers, as at the start of a
    cluster, there is no router.
    """
    whole = [name for name, layers in attention.items() if layers.num_layers == num_layers]
    if whole:
        return {name: (name,) for name in whole}
    chain = sorted(
        (name for name, layers in attention.items() if layers.num_layers),
        key=lambda name: attention[name].first_layer,
    )
    if sum(attention[name].num_layers for name in chain) < num_layers:
        return {}
    return {name: tuple(chain) for name in chain if attention[name].has_ends}
