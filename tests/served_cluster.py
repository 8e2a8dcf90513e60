"""`milliways serve` as a user runs it: a process of its own, with ports and folders of its own."""

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
# Compiled programs are shared by all tests; the rest is for the tests' own process.
_INHERITED_SETTINGS = {
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
}


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Polls until something is so."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def child_environment(folder: Path, **more: str) -> dict[str, str]:
    """For processes that shall find this checkout, and leave nothing outside `folder`."""
    dropped = set(JAX_SETTINGS) - _INHERITED_SETTINGS
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'proto'}",
        "TMPDIR": str(folder / "t"),
        "XDG_CACHE_HOME": str(folder / "c"),
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path is short, since names of Ray's sockets lie below it."""
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
    """Runs a `milliways` command to its end."""
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
        """What it said so far."""
        return (self.folder / "log").read_text("utf-8")

    def channel(self) -> aio.Channel:
        return aio.insecure_channel(f"127.0.0.1:{self.grpc_port}")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a command against it, as its user would."""
        return run_command(self.environment, *arguments)

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def metrics(self) -> dict[str, float]:
        """Every figure of /metrics, by its name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str) -> list[float]:
        """The values of one figure, whatever its labels."""
        return [v for k, v in self.metrics().items() if k.partition("{")[0] == name]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def processes(self) -> list[psutil.Process]:
        """It, and all that came of it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
        """Presses Ctrl-C; those of the processes that are there after the promised time."""
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        _, left = psutil.wait_procs(processes, timeout=0)
        return left

    def kill(self) -> None:
        """Ends whatever is left of it."""
        if self.process.poll() is None:
            end(self.processes())
            self.process.wait(STOP_TIMEOUT_S)


def end(processes: Sequence[psutil.Process]) -> None:
    """Kills processes, those that are there still."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[ServedCluster]:
    """Starts `milliways serve`; does not wait until it is ready. Kills it at the end."""
    http_port, grpc_port = free_ports(2)
    command = [sys.executable, "-m", "milliways", "serve", *arguments]
    # Some tests order faults that cannot be done from outside.
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
    """Until a token can be made; a cluster that ends instead says why."""

    def is_up() -> bool:
        assert cluster.process.poll() is None, cluster.log
        return cluster.is_ready()

    wait_until(is_up, "the cluster is ready", START_TIMEOUT_S)


@contextmanager
def one_cluster() -> Iterator[ServedCluster]:
    """Three workers, two replicas of each expert, ready. Its end leaves nothing behind."""
    with short_folder() as folder:
        with serving(folder, "--workers", "3", "--expert-replicas", "2") as running:
            wait_until_ready(running)
            yield running
            check_end(running)
        assert list((folder / "t").iterdir()) == []
        assert not any((folder / "c").rglob("*.json"))


def check_end(running: ServedCluster) -> None:
    """Ctrl-C ends every process, in time, and without complaint."""
    processes = running.processes()
    in_memory = files_in_shared_memory()
    left = running.stop(processes)
    end(left)
    assert left == []
    assert running.process.returncode == 0, running.log
    assert not files_in_shared_memory() - in_memory
    # A process that ends writes no more, so this is all it had to say.
    assert "Traceback" not in running.log, running.log


def files_in_shared_memory() -> set[str]:
    """Names in memory that outlive those who made them."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
