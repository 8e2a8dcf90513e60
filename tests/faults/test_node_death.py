"""A whole node dies, with every process on it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.faults.under_load import complaints_under_load, serving_on
from tests.served_cluster import child_environment, end, short_folder

NUM_NODES = 3


@contextmanager
def ray_nodes(environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The address of a cluster of nodes, and each node's raylet. Its end leaves no process."""
    command = [sys.executable, "-m", "tests.faults.ray_nodes", str(NUM_NODES)]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    processes: list[psutil.Process] = []
    try:
        line = next((line for line in process.stdout if line.startswith("{")), "")
        assert line, "the nodes did not come up"
        yield json.loads(line)
        processes = psutil.Process(process.pid).children(recursive=True)
        process.stdin.close()
        process.wait(60)
    finally:
        _, left = psutil.wait_procs(processes, timeout=10)
        end(left)
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_death_of_a_node_costs_no_token() -> None:
    with short_folder() as folder:
        environment = child_environment(
            folder,
            RAY_AUTH_MODE="disabled",
            RAY_TMPDIR=str(folder / "t"),
            # Several nodes on one machine.
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1",
        )
        with (
            ray_nodes(environment) as nodes,
            serving_on(nodes["address"], "127.0.0.1", environment, folder) as served,
        ):
            gone: list[str] = []

            def kill_a_node() -> None:
                node_id = served.workers()[0]["node"]
                raylet = psutil.Process(nodes["raylets"][node_id])
                gone.append(node_id)
                # The raylet first: nobody shall tidy up.
                end([raylet, *raylet.children(recursive=True)])

            found = complaints_under_load(
                served.endpoint, kill_a_node, lambda: served.is_whole(gone)
            )
            assert found == []
