"""HAProxy as we start it, without Ray: what it answers itself, and how it ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from milliways.cluster.ray import haproxy
from tests.haproxy_config import written

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
# As Ray Serve's actor: it starts HAProxy, and says which process that is.
STARTER = """
import subprocess, sys
print(subprocess.Popen(sys.argv[1:]).pid, flush=True)
sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def started(config: str, folder: Path) -> Generator[tuple[int, "subprocess.Popen[str]"]]:
    """HAProxy's process id, and the process that started it."""
    file = folder / "haproxy.cfg"
    file.write_text(config, "utf-8")
    wrapper = haproxy.write_wrapper(folder, HOST, haproxy.find_binary())
    command = [sys.executable, "-c", STARTER, str(wrapper), "-db", "-f", str(file)]
    pipe = subprocess.PIPE
    starter = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert starter.stdin is not None and starter.stdout is not None
    try:
        yield int(starter.stdout.readline()), starter
    finally:
        starter.kill()
        starter.wait()
        starter.stdin.close()
        starter.stdout.close()


@pytest.fixture
def folder() -> Generator[Path]:
    """Its name is short enough for a socket."""
    if not haproxy.find_binary():
        pytest.skip("HAProxy is not installed here")
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        yield Path(name)


def answer(port: int) -> tuple[int, str | None, dict[str, object]]:
    """Status, Retry-After and error of the first answer."""
    until_s = time.monotonic() + TIMEOUT_S
    while True:
        connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            return response.status, response.headers["Retry-After"], json.load(response)["error"]
        except ConnectionRefusedError:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        finally:
            connection.close()


@pytest.mark.parametrize("has_backend", [False, True])
def test_without_a_replica_clients_are_asked_to_come_again(folder: Path, has_backend: bool) -> None:
    port = free_port()
    config = written(
        port=port,
        socket_path=str(folder / "s"),
        has_backend=has_backend,
        # Nobody listens there.
        replica_port=free_port(),
    )
    with started(config, folder):
        status, retry_after, error = answer(port)
    assert (status, retry_after, error["type"]) == (503, "1", "server_error")


def test_it_ends_when_the_process_that_started_it_is_killed(folder: Path) -> None:
    port = free_port()
    config = written(port=port, socket_path=str(folder / "s"), has_backend=False)
    with started(config, folder) as (pid, starter):
        answer(port)
        process = psutil.Process(pid)
        assert "haproxy" in process.name()
        os.kill(starter.pid, signal.SIGKILL)
        starter.wait()
        until_s = time.monotonic() + TIMEOUT_S
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until_s
            time.sleep(0.05)
    # The next one can listen at once.
    with started(config, folder):
        answer(port)


def test_a_connection_carries_one_request_at_a_time(folder: Path) -> None:
    port = free_port()
    config = written(port=port, socket_path=str(folder / "s"), has_backend=False)
    with started(config, folder):
        answer(port)
        with socket.create_connection((HOST, port), TIMEOUT_S) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
