"""What a test with Ray nodes of its own needs: a served cluster, load, and a verdict."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from milliways.benchmarks.chaos.answers import Outcome, difference
from milliways.benchmarks.chaos.clients import Endpoint, open_clients
from milliways.benchmarks.chaos.load import Load
from milliways.benchmarks.chaos.requests import ChaosRequest, draw_requests
from tests.conftest import REPOSITORY
from tests.served_cluster import (
    STOP_TIMEOUT_S,
    child_environment,
    end,
    free_ports,
    run_command,
    wait_until,
)

# One of each mode and surface, all of them running at any time.
NUM_ASKS = 14
MAX_TOKENS = 64
WHOLE_TIMEOUT_S = 240.0
READY_METRIC = re.compile(r'milliways_worker_state\{.*state="ready"\} 1$')

# Workers go to nodes that offer them a place; what takes a CPU goes to the head.
SETTINGS = """
[workers]
count = 3
expert_replicas = 2
cpus_each = 0
resources = { place = 1 }

[ingress]
host = "{host}"
port = {port}
grpc_port = {grpc_port}
"""
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@dataclass(frozen=True, slots=True)
class OnNodes:
    """`milliways serve --address` on nodes that somebody else started."""

    address: str
    endpoint: Endpoint
    environment: dict[str, str]

    def workers(self) -> list[dict[str, Any]]:
        """All that status says of each; empty while no controller answers."""
        done = run_command(self.environment, "status", "--json", "--address", self.address)
        return json.loads(done.stdout)["workers"] if done.returncode == 0 else []

    def is_whole(self, gone: Sequence[str] = ()) -> bool:
        """Whether three workers are ready, none of them on a node that is gone."""
        # A command takes seconds of a core, which the worker that starts needs.
        if self._num_ready() != 3:
            return False
        workers = self.workers()
        return len(workers) == 3 and all(
            w["state"] == "ready" and w["node"] not in gone for w in workers
        )

    def _num_ready(self) -> int:
        """How many workers the metrics call ready; 0 while nobody answers."""
        try:
            lines = httpx.get(f"{self.endpoint.http}/metrics", timeout=30).text.splitlines()
        except httpx.TransportError:
            return 0
        return sum(READY_METRIC.match(line) is not None for line in lines)


@dataclass(slots=True)
class Nodes:
    """Ray nodes in a process of their own; raylets go by node id."""

    process: "subprocess.Popen[str]"
    address: str
    raylets: dict[str, int]

    def order(self, what: str) -> None:
        """Has the process do something; returns when it is done."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert "done\n" in self.process.stdout


@contextmanager
def ray_nodes(count: int, environment: dict[str, str]) -> Iterator[Nodes]:
    """A head, and so many nodes for workers. Its end leaves no process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.ray_nodes", str(count)],
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
        yield Nodes(process, **json.loads(line))
    finally:
        if process.poll() is None:
            processes = psutil.Process(process.pid).children(recursive=True)
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            _, left = psutil.wait_procs(processes, timeout=10)
            end(left)
            process.kill()
            process.wait()
            process.stdout.close()


@contextmanager
def serving_on(
    address: str, host: str, environment: dict[str, str], folder: Path
) -> Iterator[OnNodes]:
    """Ready when it is entered; ended by Ctrl-C."""
    port, grpc_port = free_ports(2)
    settings = folder / "settings.toml"
    text = SETTINGS.replace("{host}", host).replace("{port}", str(port))
    settings.write_text(text.replace("{grpc_port}", str(grpc_port)), "utf-8")
    command = [sys.executable, "-m", "milliways", "serve", "--config", str(settings)]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--address", address],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:

        def is_up() -> bool:
            said = (folder / "serve.log").read_text("utf-8")
            assert process.poll() is None, said
            return "Ctrl-C stops it" in said

        wait_until(is_up, "the cluster serves", WHOLE_TIMEOUT_S)
        endpoint = Endpoint(http=f"http://{host}:{port}", grpc=f"{host}:{grpc_port}")
        yield OnNodes(address, endpoint, environment)
    finally:
        process.terminate()
        try:
            process.wait(4 * STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            end([psutil.Process(process.pid)])
            process.wait()


def several_nodes(folder: Path, **more: str) -> dict[str, str]:
    """The environment of Ray nodes that share this machine."""
    return child_environment(
        folder,
        RAY_AUTH_MODE="disabled",
        RAY_TMPDIR=str(folder / "t"),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1",
        # By default Ray gives up after 30 s, in which a busy machine does not start it.
        RAY_raylet_start_wait_time_s="120",
        **more,
    )


def complaints_under_load(
    endpoint: Endpoint, strike: Callable[[], None], is_whole: Callable[[], bool]
) -> list[str]:
    """What went wrong for clients while something happened and until all was well again."""
    asks = draw_requests(NUM_ASKS, MAX_TOKENS, seed=3)
    with open_clients(endpoint) as clients:
        load = Load(asks, clients, NUM_ASKS)
        undisturbed = load.run_once()
        load.start()
        try:
            # Now all of them run.
            wait_until(lambda: load.num_ended > 2, "requests are answered")
            struck_s = time.monotonic()
            strike()
            wait_until(is_whole, "all is replicated again", WHOLE_TIMEOUT_S)
            whole_s = time.monotonic()
            num_ended = load.num_ended
            wait_until(lambda: load.num_ended > num_ended + NUM_ASKS, "all go on")
        finally:
            heard = load.stop()
    stalls_s = sorted(one.stall_s(struck_s, struck_s + 20.0) for one in heard)
    print(
        f"{len(heard)} requests, longest stalls {[round(s, 2) for s in stalls_s[-NUM_ASKS:]]} s,"
        f" whole again after {whole_s - struck_s:.1f} s"
    )
    return complaints(asks, undisturbed, heard)


def complaints(
    asks: Sequence[ChaosRequest], undisturbed: Sequence[Outcome], heard: Sequence[Outcome]
) -> list[str]:
    """A sentence for each request that failed, or was answered otherwise than undisturbed."""
    wanted = {one.request_index: one.answer for one in undisturbed}
    found: list[str] = []
    for one in [*undisturbed, *heard]:
        wrong = one.error or difference(wanted[one.request_index], one.answer)
        if one.answer.breaks:
            wrong = f"{one.answer.breaks}; {wrong}"
        if wrong:
            found.append(f"{asks[one.request_index]}: {wrong}")
    return found
