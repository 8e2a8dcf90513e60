"""How commands ask the controller of a running cluster."""

# Ray's own types are unknown in part.
# pyright: basic

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from milliways.cluster.ray.asking import ANSWER_TIMEOUT_S, RunningController
from milliways.cluster.ray.environment import be_quiet, enter, head_for
from milliways.cluster.ray.running_clusters import find_running
from milliways.wire.errors import StartupError


@contextmanager
def joined(address: str | None) -> Iterator[RunningController]:
    """Joins the Ray cluster at an address, or the one that this user started last.

    Raises:
        StartupError: no cluster runs there.
    """
    # Ray prints messages about its nodes to the standard output, where our answers go.
    with redirect_stdout(sys.stderr):
        address = _enter(address)
        # Not before: Ray reads its settings when it is imported.
        import ray

        from milliways.cluster.ray.cluster import join

        join(address)
        try:
            yield RunningController()
        finally:
            ray.shutdown()


def ask_controller(
    address: str | None, method: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S
) -> Any:
    """Joins a cluster and asks its controller one thing; see `joined` and `ask`."""
    with joined(address) as controller:
        return controller.ask(method, *arguments, timeout_s=timeout_s)


def _enter(address: str | None) -> str:
    """Prepares to join the cluster at an address, or the one started last; returns its address."""
    be_quiet()
    if address is not None:
        head_for(address)
        return address
    running = find_running()
    if running is None:
        raise StartupError("no cluster of yours runs here; `milliways serve` starts one")
    enter(running)
    return running.address
