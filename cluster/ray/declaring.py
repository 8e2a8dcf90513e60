"""Settings as declarations: when they were made, and whether a running cluster can take them."""

# Ray's own types are unknown in part.
# pyright: basic

import time

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from milliways.cluster.ray.start_controller import find_controller
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import flat
from milliways.wire.errors import ChangeRefusedError
from milliways.wire.view import Declared

CHECK_TIMEOUT_S = 30.0


def declared_now(config: ClusterConfig) -> Declared:
    """The declaration of settings that somebody wants from now on."""
    return Declared(values=flat(config), at_s=time.time())


def check_running(config: ClusterConfig) -> None:
    """Checks that the cluster that runs, if one does, can take settings, before anything changes.

    Raises:
        ChangeRefusedError: it cannot; says which settings, and why.
    """
    if not ray.is_initialized():
        return
    try:
        controller = find_controller()
        ray.get(controller.plan.remote(flat(config)), timeout=CHECK_TIMEOUT_S)
    except RayTaskError as error:
        if isinstance(error.cause, ChangeRefusedError):
            raise error.cause from None
    except (ValueError, RayActorError, GetTimeoutError):
        # None runs, or it dies: the next one decides.
        return
