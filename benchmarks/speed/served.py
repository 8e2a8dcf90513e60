"""Starts a cluster and measures its endpoints: what `milliways bench serve` runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from milliways.benchmarks.speed.programs.endpoints import (
    BenchRequest,
    GrpcBenchClient,
    HttpBenchClient,
    RouterBenchClient,
)
from milliways.benchmarks.speed.programs.process_cpu import cpu_seconds
from milliways.benchmarks.speed.serving import EndpointFigures, Send, measure_endpoints
from milliways.benchmarks.speed.under_load import LoadFigures, measure_load
from milliways.cluster.settings.config import LOOPBACK
from milliways.model.errors import ModelError
from milliways.wire.errors import StartupError
from milliways.wire.status import ClusterStatus, from_json

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
STATUS_TIMEOUT_S = 120.0
_POLL_S = 0.2
_NUM_LOG_LINES = 3


@dataclass(frozen=True, slots=True)
class ServedCluster:
    """The endpoints of a running cluster: HTTP, gRPC, and the routers' own, each host and port."""

    http: str
    grpc: str
    routers: tuple[str, ...]
    # The process of `milliways serve`.
    pid: int = 0


def measure_served(
    model_dir: Path,
    num_workers: int,
    work_dir: Path,
    request: BenchRequest,
    num_rounds: int,
    report: Callable[[str], None],
) -> list[EndpointFigures]:
    """Starts a cluster, and sends the same request to each endpoint in turn.

    Raises:
        StartupError: the cluster does not become ready.
        ModelError: a request failed.
    """
    report("starting a cluster")
    with serving(str(model_dir), num_workers, work_dir) as cluster:
        endpoints = {
            "router": RouterBenchClient(cluster.routers[0], request),
            "grpc": GrpcBenchClient(cluster.grpc, request),
            "http": HttpBenchClient(cluster.http, model_dir.name, request),
        }
        report(f"{num_rounds} rounds")
        try:
            return measure_endpoints(endpoints, num_rounds)
        except (RuntimeError, OSError) as error:
            raise ModelError(f"a request failed: {error}") from error


def measure_streams(
    model_dir: Path,
    num_workers: int,
    work_dir: Path,
    request: BenchRequest,
    num_rounds: int,
    nums_streams: Sequence[int],
    report: Callable[[str], None],
) -> list[LoadFigures]:
    """Starts a cluster, and sends requests in several streams at once, to a router and over HTTP.

    Raises:
        StartupError: the cluster does not become ready.
        ModelError: a request failed.
    """
    report("starting a cluster")
    figures: list[LoadFigures] = []
    with serving(str(model_dir), num_workers, work_dir) as cluster:
        clients: dict[str, Callable[[int], Send]] = {
            "router": lambda i: RouterBenchClient(
                cluster.routers[i % len(cluster.routers)], request
            ),
            "HTTP": lambda _: HttpBenchClient(cluster.http, model_dir.name, request),
        }
        for num_streams in nums_streams:
            for endpoint, make in clients.items():
                report(f"{num_streams} streams, {endpoint}")
                senders = [make(i) for i in range(num_streams)]
                try:
                    one = measure_load(
                        endpoint, senders, num_rounds, lambda: cpu_seconds(cluster.pid)
                    )
                except (RuntimeError, OSError) as error:
                    raise ModelError(str(error)) from error
                figures.append(one)
    return figures


@contextmanager
def serving(model: str, num_workers: int, work_dir: Path) -> Generator[ServedCluster]:
    """Runs `milliways serve` on free ports, and ends it.

    Raises:
        StartupError: the cluster does not become ready.
    """
    http_port, grpc_port = _free_ports(2)
    flags = ["--model", model, "--workers", str(num_workers)]
    flags += ["--port", str(http_port), "--grpc-port", str(grpc_port)]
    environment = _environment(work_dir)
    log_path = work_dir / "serve.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "milliways", "serve", *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _wait_until_ready(f"http://{LOOPBACK}:{http_port}/ready", process, log_path)
        routers = routers_of(_status(environment))
        yield ServedCluster(
            f"{LOOPBACK}:{http_port}", f"{LOOPBACK}:{grpc_port}", routers, process.pid
        )
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def routers_of(status: ClusterStatus) -> tuple[str, ...]:
    """The addresses of the workers that have a router."""
    return tuple(w.router_address for w in status.workers if w.router_address)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            with urlopen(url, timeout=10.0):
                return
        except (URLError, OSError):
            time.sleep(_POLL_S)
    lines = log_path.read_text("utf-8", errors="replace").strip().splitlines()
    raise StartupError(" / ".join(["the cluster is not ready", *lines[-_NUM_LOG_LINES:]]))


def _status(environment: dict[str, str]) -> ClusterStatus:
    command = [sys.executable, "-m", "milliways", "status", "--json"]
    done = subprocess.run(
        command, env=environment, capture_output=True, timeout=STATUS_TIMEOUT_S, check=False
    )
    if done.returncode:
        output = done.stderr.decode(errors="replace").strip()
        raise StartupError(f"`milliways status` failed: {output}")
    return from_json(json.loads(done.stdout))


def _environment(work_dir: Path) -> dict[str, str]:
    return os.environ | {
        # A cluster that the user already runs stays the one that `milliways status` finds.
        "XDG_CACHE_HOME": str(work_dir / "cache"),
    }


def _free_ports(num_ports: int) -> list[int]:
    probes = [socket.socket() for _ in range(num_ports)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
