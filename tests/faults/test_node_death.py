"""A whole node dies; the head dies and gets its state back from Redis."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.under_load import (
    Nodes,
    OnNodes,
    complaints_under_load,
    ray_nodes,
    serving_on,
    several_nodes,
)
from tests.served_cluster import end, free_ports, short_folder, wait_until

HOST = "127.0.0.1"
HAS_REDIS = shutil.which("redis-server") is not None


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Starts a Redis; yields its address."""
    (port,) = free_ports(1)
    options = ["--port", str(port), "--bind", HOST, "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        yield f"{HOST}:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster_on_nodes() -> Iterator[tuple[Nodes, OnNodes]]:
    """Three nodes with one worker each; the head keeps its state in Redis if that is installed."""
    with ExitStack() as stack:
        folder = stack.enter_context(short_folder())
        storage: dict[str, str] = {}
        if HAS_REDIS:
            storage["RAY_REDIS_ADDRESS"] = stack.enter_context(redis(folder))
        environment = several_nodes(folder, **storage)
        nodes = stack.enter_context(ray_nodes(3, environment))
        served = stack.enter_context(serving_on(nodes.address, HOST, environment, folder))
        yield nodes, served


@pytest.mark.skipif(not HAS_REDIS, reason="redis-server is not installed")
def test_restart_of_the_head_costs_no_token(cluster_on_nodes: tuple[Nodes, OnNodes]) -> None:
    nodes, served = cluster_on_nodes
    victim = served.workers()[0]

    def restart_head() -> None:
        nodes.order("kill-gcs")
        # A worker dies while there is no head; other workers hold its experts.
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(victim["pid"]), "the worker is gone")
        nodes.order("start-gcs")

    def is_whole() -> bool:
        if not served.is_whole():
            return False
        workers = {worker["worker_id"]: worker for worker in served.workers()}
        mine = workers.get(victim["worker_id"], victim)
        return mine["incarnation"] > victim["incarnation"]

    assert complaints_under_load(served.endpoint, restart_head, is_whole) == []


def test_death_of_a_node_costs_no_token(cluster_on_nodes: tuple[Nodes, OnNodes]) -> None:
    nodes, served = cluster_on_nodes
    node_id = served.workers()[0]["node"]

    def kill_the_node() -> None:
        raylet = psutil.Process(nodes.raylets[node_id])
        # The raylet first, so that it cannot clean up.
        end([raylet, *raylet.children(recursive=True)])

    def is_whole() -> bool:
        return served.is_whole(gone=[node_id])

    assert complaints_under_load(served.endpoint, kill_the_node, is_whole) == []
