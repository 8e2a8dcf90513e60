"""Chooses the victim of a fault, and decides whether a cluster is fully replicated again. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from milliways.benchmarks.chaos.faults import Fault
from milliways.wire.placement import ExpertId
from milliways.wire.status import WorkerStatus
from milliways.wire.view import ClusterView, WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A process of the cluster."""

    name: str
    node_id: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """What a worker holds and does; decides whether it fits as the victim of a fault."""

    place: Place
    num_experts: int
    num_layers: int
    is_router: bool
    num_active_requests: int = 0
    num_kv_blocks_used: int = 0

    @classmethod
    def of(cls, status: WorkerStatus) -> "WorkerFacts":
        """From a worker's part of the cluster's status."""
        place = Place(name=status.worker_id, node_id=status.node, pid=status.pid)
        num_experts, process = len(status.experts), status.process
        if process is None:
            return cls(place=place, num_experts=num_experts, num_layers=0, is_router=False)
        return cls(
            place=place,
            num_experts=num_experts,
            num_layers=process.layers[1],
            is_router=process.has_ends,
            num_active_requests=process.router.active_requests,
            num_kv_blocks_used=process.router.kv_blocks_used,
        )


# How well a worker fits as the victim of a fault: the tuples are compared, and the first entry
# must hold. For example, kill-expert needs a worker with experts, and prefers one without layers.
_PREFERENCES: Mapping[Fault, Callable[[WorkerFacts], tuple[bool, ...]]] = {
    Fault.KILL_EXPERT: lambda w: (
        w.num_experts > 0,
        w.num_layers == 0,
        w.num_active_requests == 0,
    ),
    Fault.KILL_ATTENTION: lambda w: (w.num_layers > 0, not w.is_router, w.num_kv_blocks_used > 0),
    Fault.KILL_ROUTER: lambda w: (w.is_router, w.num_active_requests > 0),
}


def choose(fault: Fault, workers: Sequence[WorkerFacts], draw: int) -> Place | None:
    """One of the workers that fit best as the victim; None if no worker fits."""
    fitness = _PREFERENCES.get(fault, lambda w: (True,))
    in_order = sorted(workers, key=lambda w: w.place.name)
    best = max((fitness(worker) for worker in in_order), default=(False,))
    if not best[0]:
        return None
    candidates = [worker.place for worker in in_order if fitness(worker) == best]
    return candidates[draw % len(candidates)]


@dataclass(frozen=True, slots=True)
class Replication:
    """How many replicas of everything a cluster had before the first fault."""

    num_ready: int
    num_routers: int
    num_holders: Mapping[ExpertId, int]
    # The processes that the connections of clients go through.
    num_ingress: int = 0
    num_proxies: int = 0

    @classmethod
    def of(
        cls, view: ClusterView, ingress: Sequence[Place] = (), proxies: Sequence[Place] = ()
    ) -> "Replication":
        """From a view without faults, and the processes that serve clients."""
        experts = frozenset[ExpertId]().union(*(m.experts for m in view.members.values()))
        return cls(
            num_ready=_num_ready(view),
            num_routers=len(view.routers()),
            num_holders={expert_id: len(view.holders(expert_id)) for expert_id in experts},
            num_ingress=len(ingress),
            num_proxies=len(proxies),
        )

    def holds_in(self, view: ClusterView) -> bool:
        """Whether the workers hold at least as many replicas of everything."""
        return (
            _num_ready(view) >= self.num_ready
            and len(view.routers()) >= self.num_routers
            and all(len(view.holders(e)) >= count for e, count in self.num_holders.items())
        )

    def serves_as_before(self, ingress: Sequence[Place], proxies: Sequence[Place]) -> bool:
        """Whether at least as many processes serve clients."""
        return len(ingress) >= self.num_ingress and len(proxies) >= self.num_proxies


def _num_ready(view: ClusterView) -> int:
    return sum(member.state is WorkerState.READY for member in view.members.values())
