"""Starts a worker as a Ray actor, in a placement group that keeps its resources.

Workers of different generations may have the same worker_id; the names of their actors and groups
begin with the number of the generation.

The group stays between two incarnations of a worker, so that nobody takes its GPUs meanwhile. If no
node has room for the group, Ray's autoscaler starts a node.
"""

# Ray's own types are unknown in part.
# pyright: basic

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from milliways.cluster.control.fleet import number_of
from milliways.cluster.ray.worker_actor import WorkerActor
from milliways.cluster.settings.config import ClusterConfig, WorkerSettings
from milliways.wire.placement import ModelBytes

NAMESPACE = "milliways"


def actor_name(generation: int, worker_id: str, incarnation: int) -> str:
    """The name of the actor of one incarnation of a worker."""
    return f"g{generation}-{worker_id}-{incarnation}"


def group_name(generation: int, worker_id: str) -> str:
    """The name of a worker's placement group."""
    return f"milliways-g{generation}-{worker_id}"


def start_worker(
    config: ClusterConfig,
    generation: int,
    worker_id: str,
    incarnation: int,
    group: PlacementGroup,
    sizes: ModelBytes,
) -> ActorHandle[Any]:
    """Asks Ray to start one incarnation of a worker; Ray does so when the group has a node.

    `sizes` are those of the model's parts, so that the worker reads only the files that it needs.

    `max_restarts` is 0: Ray reports a death within 30 ms then, and the controller restarts.

    Raises:
        ValueError: there is an actor of that incarnation already.
    """
    settings = config.workers
    remote: Any = ray.remote(WorkerActor)
    return remote.options(
        name=actor_name(generation, worker_id, incarnation),
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=0,
        max_concurrency=64,
        num_cpus=settings.cpus_each,
        num_gpus=settings.gpus_each,
        resources=dict(settings.resources_of(number_of(worker_id))),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
    ).remote(config, worker_id, incarnation, sizes)


def group_of(settings: WorkerSettings, generation: int, worker_id: str) -> PlacementGroup:
    """The placement group of a worker; an earlier controller may have made it."""
    name = group_name(generation, worker_id)
    try:
        return get_placement_group(name)
    except ValueError:
        bundle = resources_of(settings, worker_id)
        return placement_group([bundle], name=name, lifetime="detached")


def resources_of(settings: WorkerSettings, worker_id: str) -> dict[str, float]:
    """What a worker takes of one node."""
    extra = settings.resources_of(number_of(worker_id))
    wanted = {"CPU": settings.cpus_each, "GPU": settings.gpus_each, **extra}
    return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}
