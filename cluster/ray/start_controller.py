"""Starts the controller as a Ray actor, finds it, and ends it."""

# Ray's own types are unknown in part.
# pyright: basic

import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from milliways.cluster.ray.controller_actor import ControllerActor
from milliways.cluster.ray.start_worker import NAMESPACE
from milliways.cluster.settings.config import ClusterConfig

logger = logging.getLogger(__name__)

CONTROLLER_NAME = "controller"


def find_controller() -> Any:
    """The running controller. Raises ValueError if there is none."""
    return ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)


def is_controller_running() -> bool:
    """Whether the Ray cluster has a controller already."""
    try:
        find_controller()
    except ValueError:
        return False
    return True


def find_or_start_controller(config: ClusterConfig, declared_at_s: float = 0.0) -> Any:
    """The controller of the cluster. One that runs already is to be told settings by `declare`."""
    remote: Any = ray.remote(ControllerActor)
    return remote.options(
        name=CONTROLLER_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=0,
        max_concurrency=1000,
        num_cpus=0,
    ).remote(config, declared_at_s)


def end_controller(timeout_s: float) -> None:
    """Ends all workers and the controller, if there is one; waits at most `timeout_s`."""
    try:
        controller = find_controller()
    except ValueError:
        return
    try:
        ray.get(controller.stop.remote(), timeout=timeout_s)
    except (RayActorError, GetTimeoutError) as error:
        logger.warning("the controller does not stop its workers: %s", error)
    ray.kill(controller)
