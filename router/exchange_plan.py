"""The plan of an exchange: which worker computes which experts, for as long as nothing changes.

A compiled step cannot choose a worker for each row, as `Dispatcher` does. It goes by a plan, which
the router makes from a view and from what it knows of the workers. Pure.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from typing import NamedTuple

import numpy as np

from milliways.wire.exchange import BY_PYTHON, HERE
from milliways.wire.view import ClusterView


class Reach(NamedTuple):
    """How a router reaches workers: the one of its process, links with a ring, all others.

    `open_ids` are all workers that can be asked; `silent` those that have not answered lately;
    `far` those with a ring that a connection carries from another host.
    """

    local_id: str
    links: Mapping[str, int]
    open_ids: Set[str]
    silent: Set[str]
    far: Set[str] = frozenset()


def plan_targets(view: ClusterView, reach: Reach, num_layers: int, num_experts: int) -> np.ndarray:
    """The target of each expert, [L, E] int64: HERE, the number of a link, or BY_PYTHON.

    As with single rows, workers that answer come first, then the worker of this process, then
    workers with a ring, those of this host first. Among equals, experts are shared out evenly.
    """
    holders: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for worker_id, member in sorted(view.members.items()):
        if member.can_compute and worker_id in reach.open_ids:
            for expert in member.experts:
                holders[expert.layer, expert.expert].append(worker_id)
    targets_LE = np.full((num_layers, num_experts), BY_PYTHON, np.int64)
    num_planned: Counter[str] = Counter()

    def cost(worker_id: str) -> tuple[bool, bool, bool, bool, int]:
        is_local, has_ring = worker_id == reach.local_id, worker_id in reach.links
        return (
            *(worker_id in reach.silent, not is_local, not has_ring, worker_id in reach.far),
            num_planned[worker_id],
        )

    for (layer, expert), candidates in sorted(holders.items()):
        chosen = min(candidates, key=cost)
        num_planned[chosen] += 1
        if chosen == reach.local_id:
            targets_LE[layer, expert] = HERE
        else:
            targets_LE[layer, expert] = reach.links.get(chosen, BY_PYTHON)
    return targets_LE
