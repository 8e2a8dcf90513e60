"""`milliways serve` as a user runs it: in its own process, with its own ports and folders."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from grpc import aio

from tests.conftest import JAX_SETTINGS, REPOSITORY

START_TIMEOUT_S = 240.0
# What `milliways serve` promises of Ctrl-C.
STOP_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 120.0
POLL_S = 0.05
# Child processes share the compiled programs; the tests' other JAX settings stay with the tests.
_INHERITED_SETTINGS = {
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
}


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Polls until `holds` returns true."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback address."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def child_environment(folder: Path, **more: str) -> dict[str, str]:
    """Environment for processes that use this checkout and write only below `folder`."""
    dropped = set(JAX_SETTINGS) - _INHERITED_SETTINGS
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {
        "PYTHONPATH": str(REPOSITORY),
        "TMPDIR": str(folder / "t"),
        "XDG_CACHE_HOME": str(folder / "c"),
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path, because Ray's socket paths below it are limited."""
    folder = Path(tempfile.mkdtemp(prefix="mwt-"))
    try:
        for name in ("t", "c"):
            (folder / name).mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_stray_folder(parent: Path) -> Path:
    """A working directory with files and folders of our rooms' names, which no import may reach.

    Ray puts a driver's directory first on the path of its workers.
    """
    folder = parent / "stray"
    for name in ("cluster", "workers", "proto"):
        (folder / name).mkdir(parents=True)
    for name in ("model.py", "router.py", "benchmarks.py", "workers/__init__.py"):
        (folder / name).write_text(f"raise RuntimeError('the stray {name} was imported')\n")
    return folder


def run_command(
    environment: dict[str, str], *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Runs a `milliways` command and waits for it."""
    return subprocess.run(
        [sys.executable, "-m", "milliways", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class ServedCluster:
    """A running `milliways serve`."""

    process: "subprocess.Popen[bytes]"
    environment: dict[str, str]
    folder: Path
    http_port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def working_folder(self) -> Path:
        """Where it was started; see `make_stray_folder`."""
        return self.folder / "stray"

    @property
    def log(self) -> str:
        """Its output so far."""
        return (self.folder / "log").read_text("utf-8")

    def channel(self) -> aio.Channel:
        return aio.insecure_channel(f"127.0.0.1:{self.grpc_port}")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a `milliways` command as the same user."""
        return run_command(self.environment, *arguments)

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def metrics(self) -> dict[str, float]:
        """The values of /metrics by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str) -> list[float]:
        """The values of one metric, for all labels."""
        return [v for k, v in self.metrics().items() if k.partition("{")[0] == name]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def processes(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
        """Sends Ctrl-C; returns the processes that still run after the promised time."""
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        _, left = psutil.wait_procs(processes, timeout=0)
        return left

    def kill(self) -> None:
        """Kills the process and its descendants."""
        if self.process.poll() is None:
            end(self.processes())
            self.process.wait(STOP_TIMEOUT_S)


def end(processes: Sequence[psutil.Process]) -> None:
    """Kills those processes that still run."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[ServedCluster]:
    """Starts `milliways serve` without waiting until it is ready; kills it at the end."""
    http_port, grpc_port = free_ports(2)
    command = [sys.executable, "-m", "milliways", "serve", *arguments]
    # Some tests need faults that only the worker itself can cause.
    environment = child_environment(folder, MILLIWAYS_FAULTS="1", PYTHONPATH=".")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(http_port), "--grpc-port", str(grpc_port)],
            cwd=make_stray_folder(folder),
            env=environment,
            stdout=log,
            stderr=log,
        )
    cluster = ServedCluster(process, environment, folder, http_port, grpc_port)
    try:
        yield cluster
    finally:
        cluster.kill()


def wait_until_ready(cluster: ServedCluster) -> None:
    """Waits until a token can be made; fails with the log if the process ends."""

    def is_up() -> bool:
        assert cluster.process.poll() is None, cluster.log
        return cluster.is_ready()

    wait_until(is_up, "the cluster is ready", START_TIMEOUT_S)


@contextmanager
def one_cluster() -> Iterator[ServedCluster]:
    """A ready cluster of three workers and two replicas; asserts that its end leaves nothing."""
    with short_folder() as folder:
        with serving(folder, "--workers", "3", "--expert-replicas", "2") as running:
            wait_until_ready(running)
            yield running
            check_end(running)
        assert list((folder / "t").iterdir()) == []
        assert not any((folder / "c").rglob("*.json"))


def check_end(running: ServedCluster) -> None:
    """Asserts that Ctrl-C ends every process in time and without an error."""
    processes = running.processes()
    in_memory = files_in_shared_memory()
    left = running.stop(processes)
    end(left)
    assert left == []
    assert running.process.returncode == 0, running.log
    assert not files_in_shared_memory() - in_memory
    # The process has ended, so the log is complete.
    assert "Traceback" not in running.log, running.log


def files_in_shared_memory() -> set[str]:
    """Names of shared memory files, which outlive their processes."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
