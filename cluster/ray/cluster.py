"""Starts a small local Ray cluster, or joins one that runs.

A local cluster listens on the loopback address only. `environment` has the settings that Ray reads
when it is imported.
"""

# Ray's own types are unknown in part.
# pyright: basic

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import services as _services
from ray._private import worker as _worker

from milliways.cluster.ray.descendants import end_descendants, reap_orphans
from milliways.cluster.ray.notices import notice_of
from milliways.cluster.ray.start_worker import NAMESPACE
from milliways.cluster.settings.config import LOOPBACK
from milliways.wire.addresses import plain_host
from milliways.wire.errors import RayGoneError, StartupError

# More than all actors ask for: on one machine the operating system shares out the processors.
LOCAL_CPUS = 1024
OBJECT_STORE_BYTES = 100 << 20
STOP_TIMEOUT_S = 5.0
START_ATTEMPTS = 3
CHECK_AGAIN_AFTER_S = 0.2
KNOCK_TIMEOUT_S = 5.0
# Ray's processes without which nothing is served, by Ray's name and by ours.
_ESSENTIAL = {"gcs_server": "control service (GCS)", "raylet": "raylet"}
# Ray's log lines of severity E (error), C (critical) and F (fatal).
_LAST_WORDS = re.compile(r"^\[[^\]]* [ECF] [^\]]*\](?: \([^)]*\))? \S+: (.*)$", re.MULTILINE)
_SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
    # By default a raylet gives up on its agents after some seconds; a busy machine needs longer.
    "agent_register_timeout_ms": 120_000,
}


class LocalRay:
    """A Ray cluster of one node, whose processes are children of this process.

    It ends with the thread that made it: the kernel then kills Ray's processes.
    """

    def __init__(self, folder: Path, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Starts it, with its sockets and logs below `folder`; tries again as long as `is_wanted`.

        Raises:
            StartupError: Ray does not come up; nothing of it is left.
        """
        self._folder = folder
        # Its remarks are that it started, and that it handles no signals in this thread: we do.
        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
        _worker.print_to_stdstream = _print_notice
        # On a busy machine the first try may take longer than Ray waits for its own processes.
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self.address = self._start()
                return
            except Exception as error:
                # Ray has no type of its own for this.
                if not is_wanted():
                    raise StartupError("Ray is not wanted any more") from error
                with suppress(Exception):
                    ray.shutdown()
                end_descendants(STOP_TIMEOUT_S)
                if attempt == START_ATTEMPTS:
                    raise StartupError(_not_started(error)) from error

    def check(self) -> None:
        """Reaps what has ended.

        Raises:
            RayGoneError: one of the processes without which nothing is served has ended.
        """
        node: Any = _worker._global_node
        if node is None:
            return
        for name, process in node.dead_processes():
            if name in _ESSENTIAL:
                text = f"Ray's {_ESSENTIAL[name]} {_ended(process.returncode)}"
                raise RayGoneError(f"{text}{self._last_words(name)}: the cluster ends")
        reap_orphans({process.pid for _, process in [*node.live_processes()]})

    def check_again(self, timeout_s: float) -> None:
        """As `check`, for a while: the death of a process may be noticed later than its effects."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.check()
            time.sleep(CHECK_AGAIN_AFTER_S)

    def _start(self) -> str:
        with _groups_of_their_own():
            context: Any = ray.init(
                address="local",
                num_cpus=LOCAL_CPUS,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                namespace=NAMESPACE,
                _temp_dir=str(self._folder),
                _node_ip_address=LOOPBACK,
                _system_config=_SYSTEM_CONFIG,
            )
        return context.address_info["gcs_address"]

    def _last_words(self, name: str) -> str:
        """What a process of Ray wrote last of what went wrong; it goes before its folder does."""
        for path in self._folder.glob(f"session_latest/logs/{name}.*"):
            with suppress(OSError):
                found = _LAST_WORDS.findall(path.read_text("utf-8", errors="replace"))
                if found:
                    return f" ({found[-1].strip()[:300]})"
        return ""


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Makes Ray start its processes outside this process's group.

    Whoever ends a group, such as `timeout`, would otherwise end them before our requests.
    """
    usual = _services.ConsolePopen

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, process_group=0)

    _services.ConsolePopen = Popen
    try:
        yield
    finally:
        _services.ConsolePopen = usual


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _not_started(error: Exception) -> str:
    load, _, _ = os.getloadavg()
    busy = f"{START_ATTEMPTS} tries, load {load:.1f} on {os.cpu_count()} processors"
    return f"Ray does not start here ({busy}): {error}"


def _print_notice(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Prints a message of Ray to this process, in place of Ray's own printing."""
    notice = notice_of("\n".join(data["lines"]))
    if notice:
        with suppress(OSError):
            print(notice, file=sys.stderr, flush=True)


def join(address: str) -> None:
    """Joins a cluster that runs.

    Raises:
        StartupError: there is none at the address.
    """
    _knock(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartupError(f"no Ray cluster answers at {address}: {error}") from error


def _knock(address: str) -> None:
    """Fails at once if nothing listens at the address. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "://" in address:
        # `auto`, or a form of address that only Ray knows.
        return
    try:
        socket.create_connection((plain_host(host), int(port)), KNOCK_TIMEOUT_S).close()
    except OSError as error:
        raise StartupError(f"no Ray cluster answers at {address}: {error}") from error
