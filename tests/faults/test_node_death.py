"""A whole node dies with all its processes; the head's memory dies, and comes back from Redis."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.under_load import (
    complaints_under_load,
    ray_nodes,
    serving_on,
    several_nodes,
)
from tests.served_cluster import end, free_ports, short_folder, wait_until

HOST = "127.0.0.1"


@pytest.mark.slow
def test_death_of_a_node_costs_no_token() -> None:
    with short_folder() as folder:
        environment = several_nodes(folder)
        with (
            ray_nodes(3, environment) as nodes,
            serving_on(nodes.address, HOST, environment, folder) as served,
        ):
            gone: list[str] = []

            def kill_a_node() -> None:
                node_id = served.workers()[0]["node"]
                raylet = psutil.Process(nodes.raylets[node_id])
                gone.append(node_id)
                # The raylet first: nobody shall tidy up.
                end([raylet, *raylet.children(recursive=True)])

            def is_whole() -> bool:
                return served.is_whole(gone)

            assert complaints_under_load(served.endpoint, kill_a_node, is_whole) == []


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """The address of a Redis of its own."""
    (port,) = free_ports(1)
    options = ["--port", str(port), "--bind", HOST, "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        yield f"{HOST}:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_restart_of_the_head_costs_no_token() -> None:
    with short_folder() as folder, redis(folder) as address:
        environment = several_nodes(folder, RAY_REDIS_ADDRESS=address)
        with (
            ray_nodes(2, environment) as nodes,
            serving_on(nodes.address, HOST, environment, folder) as served,
        ):
            victim = served.workers()[0]

            def restart_head() -> None:
                nodes.order("kill-gcs")
                # Without a head a worker dies: others have its experts.
                os.kill(victim["pid"], signal.SIGKILL)
                wait_until(lambda: not psutil.pid_exists(victim["pid"]), "the worker is gone")
                nodes.order("start-gcs")

            def is_whole() -> bool:
                workers = {worker["worker_id"]: worker for worker in served.workers()}
                mine = workers.get(victim["worker_id"], victim)
                return served.is_whole() and mine["incarnation"] > victim["incarnation"]

            assert complaints_under_load(served.endpoint, restart_head, is_whole) == []
