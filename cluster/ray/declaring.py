"""Settings as declarations: when they were made, and whether a running cluster can take them."""

# Ray's own types are unknown in part.
# pyright: basic

import logging
import time
from collections.abc import Callable

import ray

from milliways.cluster.control.changes import is_same_generation
from milliways.cluster.ray.asking import RunningController
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import flat
from milliways.wire.errors import StartupError, UnavailableError
from milliways.wire.status import GenerationStatus
from milliways.wire.view import Declared

logger = logging.getLogger(__name__)

# How long the controller is given to answer, beyond what it waits for.
ANSWER_TIMEOUT_S = 30.0
PREPARE_S = 5.0


def declared_now(config: ClusterConfig) -> Declared:
    """The declaration of settings that somebody wants from now on."""
    return Declared(values=flat(config), at_s=time.time())


def make_possible(declared: Declared) -> bool:
    """Checks that the cluster that runs, if one does, can take settings, before anything changes.

    If they need a new generation of workers, it is started; this returns when it is complete.
    Returns whether there is one.

    Raises:
        ChangeRefusedError: it cannot take them; says which settings, and why.
        ConfigError: they do not go together.
    """
    if not ray.is_initialized():
        return False
    controller = RunningController()
    try:
        running: ClusterConfig = controller.ask("config")
        if is_same_generation(flat(running), declared.values):
            controller.ask("plan", declared.values)
            return False
    except (StartupError, UnavailableError):
        # None runs, or it dies: the next one decides.
        return False
    prepare(controller, declared)
    return True


def prepare(
    controller: RunningController, declared: Declared, say: Callable[[str], object] = logger.info
) -> GenerationStatus:
    """Waits until a generation of workers with these settings is complete; says how far it is.

    Should the controller die, the next one is asked.

    Raises:
        ChangeRefusedError: there will be none; says why.
    """
    said = ""
    while True:
        status: GenerationStatus = controller.ask_next(
            "prepare", declared, PREPARE_S, timeout_s=PREPARE_S + ANSWER_TIMEOUT_S
        )
        text = (
            f"generation {status.generation}: {status.num_ready} of {status.num_workers}"
            " new workers ready"
        )
        if text != said:
            said = text
            say(said)
        if status.is_complete or status.serves:
            return status
