"""Starts a cluster for one run: `milliways serve` in a process, on free ports."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO
from urllib.error import URLError

from milliways.cluster.ray.environment import FAULTS_VARIABLE
from milliways.cluster.ray.running_clusters import RunningCluster, find_running_by
from milliways.cluster.settings.config import LOOPBACK
from milliways.wire.errors import StartupError
from milliways.wire.local_http import open_url

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A `milliways serve` that serves."""

    running: RunningCluster
    process: "subprocess.Popen[bytes]"
    _log: BinaryIO

    def output(self) -> str:
        """What it has said so far."""
        return _read(self._log)


@contextmanager
def local_cluster(arguments: Sequence[str]) -> Generator[LocalCluster]:
    """Starts a cluster and waits until it is ready; at the end, stops it.

    Raises:
        StartupError: the cluster does not become ready; the message has the cluster's output.
    """
    http_port, grpc_port = _free_ports(2)
    ports = ["--port", str(http_port), "--grpc-port", str(grpc_port)]
    command = [sys.executable, "-m", "milliways", "serve", *arguments, *ports]
    with tempfile.TemporaryFile() as log:
        # In a session of its own, so that Ctrl-C reaches only this process, which then stops it.
        process = subprocess.Popen(
            command,
            env=os.environ | {FAULTS_VARIABLE: "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield LocalCluster(_wait_until_ready(process), process, log)
        except StartupError as error:
            raise StartupError(f"{error}\n{_read(log)}") from error
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            process.kill()
            process.wait()


def _read(log: BinaryIO) -> str:
    # The process writes through the same file description, whose place must stay at the end.
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")


def _wait_until_ready(process: "subprocess.Popen[bytes]") -> RunningCluster:
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise StartupError(f"`milliways serve` ended with exit code {process.returncode}")
        running = find_running_by(process.pid)
        if running is not None and _is_ready(running.http):
            return running
        time.sleep(POLL_S)
    raise StartupError(f"`milliways serve` is not ready within {START_TIMEOUT_S:g} s")


def _is_ready(url: str) -> bool:
    with suppress(URLError, OSError), open_url(f"{url}/ready", timeout_s=10.0):
        return True
    return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
