"""Whether new workers have room beside those that run.

Pure: what nodes have left is handed in. If there is no room, the error has the calculation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from milliways.cluster.control.planner import PlacementPolicy, WorkerMemory, plan
from milliways.cluster.control.targets import ControllerSettings, num_replicas
from milliways.wire.errors import PlacementError
from milliways.wire.placement import BYTES_PER_GB, ModelBytes

# Resources of one node by Ray's names, such as CPU.
Amounts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """What a node has left of its resources, and its host's memory: for workers, and in use."""

    node_id: str
    free: Amounts
    memory_bytes: int
    used_bytes: int = 0


def assigned(wanted: Sequence[Amounts], nodes: Sequence[NodeRoom]) -> list[NodeRoom | None]:
    """A node for each worker; None for a worker that has room on no node.

    Each goes to the node with the most memory left for it, of those with all of its resources.
    """
    free = {node.node_id: dict(node.free) for node in nodes}
    taken: Counter[str] = Counter()
    chosen: list[NodeRoom | None] = []
    for amounts in wanted:
        open_to = [node for node in nodes if _has(free[node.node_id], amounts)]
        best = max(
            open_to,
            key=lambda n: (n.memory_bytes - n.used_bytes) / (1 + taken[n.node_id]),
            default=None,
        )
        chosen.append(best)
        if best is not None:
            taken[best.node_id] += 1
            for name, amount in amounts.items():
                free[best.node_id][name] = free[best.node_id].get(name, 0.0) - amount
    return chosen


def check_room(
    model: ModelBytes,
    settings: ControllerSettings,
    wanted: Sequence[Amounts],
    nodes: Sequence[NodeRoom],
    *,
    limit_bytes: int = 0,
    on_gpus: bool = False,
) -> str:
    """Checks that workers have room beside those that run; returns the room, for people.

    `wanted` is what each worker takes of a node. `limit_bytes` is the memory that each may use; 0
    means an equal share of its host's. With `on_gpus` the host's memory does not count.

    Raises:
        PlacementError: there is no room; says what is short.
    """
    places = assigned(wanted, nodes)
    placed = [place for place in places if place is not None]
    if len(placed) < len(places):
        amounts = wanted[places.index(None)]
        raise PlacementError(
            f"no room for {len(wanted)} workers beside the present ones: {len(placed)} have room,"
            f" and another needs {_listed(amounts)} of one node{_most(amounts, nodes)}"
        )
    text = f"{len(wanted)} new workers have room: each takes {_listed(wanted[0])}"
    if on_gpus:
        return text
    needed = _needed(model, settings, placed, limit_bytes)
    for node in {place.node_id: place for place in placed}.values():
        left = node.memory_bytes - node.used_bytes
        if needed[node.node_id] > left:
            raise PlacementError(
                f"no room for new workers beside the present ones: they need"
                f" {_gb(needed[node.node_id])} on node {node.node_id[:8]}, which has"
                f" {_gb(node.memory_bytes)} for workers and {_gb(node.used_bytes)} of that in use"
            )
    return f"{text}; together they need {_gb(sum(needed.values()))}"


def _needed(
    model: ModelBytes, settings: ControllerSettings, placed: Sequence[NodeRoom], limit_bytes: int
) -> Counter[str]:
    """How many bytes the workers will use on each node: planned as the controller will."""
    workers = [
        WorkerMemory(
            worker_id=f"worker-{number}",
            node_id=place.node_id,
            memory_bytes=limit_bytes or place.memory_bytes // len(placed),
            takes_attention=number >= settings.experts_only,
        )
        for number, place in enumerate(placed)
    ]
    policy = PlacementPolicy(
        expert_replicas=num_replicas(settings, len(workers)),
        attention=settings.policy.attention,
        kv_tokens=settings.policy.kv_tokens,
        spread_nodes=settings.policy.spread_nodes,
    )
    needed: Counter[str] = Counter()
    for planned in plan(model, workers, policy).workers:
        needed[planned.worker.node_id] += planned.used_bytes
    return needed


def _has(free: Amounts, wanted: Amounts) -> bool:
    return all(free.get(name, 0.0) >= amount for name, amount in wanted.items())


def _listed(amounts: Amounts) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def _most(wanted: Amounts, nodes: Sequence[NodeRoom]) -> str:
    """The most that any node has left, for people."""
    if not nodes:
        return " (no node is there)"
    most = {name: max(node.free.get(name, 0.0) for node in nodes) for name in wanted}
    return f" (the most that a node has left: {_listed(most)})"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / BYTES_PER_GB:.3g} GB"
