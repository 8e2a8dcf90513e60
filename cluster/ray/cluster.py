"""Starts a small local Ray cluster, or joins one that runs.

A local cluster listens on the loopback address only. `environment` has the settings that Ray reads
when it is imported.
"""

# Ray's own types are unknown in part.
# pyright: basic

import socket
import tempfile
from contextlib import suppress
from typing import Any

import psutil
import ray

from milliways.cluster.ray.start_worker import NAMESPACE
from milliways.cluster.settings.config import LOOPBACK
from milliways.wire.errors import StartupError

# More than all actors ask for: on one machine the operating system shares out the processors.
LOCAL_CPUS = 1024
OBJECT_STORE_BYTES = 100 << 20
STOP_TIMEOUT_S = 5.0
START_ATTEMPTS = 2
KNOCK_TIMEOUT_S = 5.0
_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}


class LocalRay:
    """A Ray cluster of one node that this process started, and ends."""

    def __init__(self) -> None:
        """Starts it.

        Raises:
            StartupError: Ray does not come up; nothing of it is left.
        """
        # On a busy machine the first try may take longer than Ray waits for its own processes.
        for _ in range(START_ATTEMPTS - 1):
            with suppress(StartupError):
                self._start()
                return
        self._start()

    def stop(self) -> None:
        """Ends every process of it."""
        processes = psutil.Process().children(recursive=True)
        # First Ray ends its processes. Then we end those that are left, such as workers whose
        # raylet is dead.
        ray.shutdown()
        _, left = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
        self._temp_dir.cleanup()

    def _start(self) -> None:
        # Names of Unix sockets have at most 107 characters, of which Ray's session takes 60.
        self._temp_dir = tempfile.TemporaryDirectory(prefix="mw-", ignore_cleanup_errors=True)
        try:
            context: Any = ray.init(
                address="local",
                num_cpus=LOCAL_CPUS,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                namespace=NAMESPACE,
                _temp_dir=self._temp_dir.name,
                _node_ip_address=LOOPBACK,
                _system_config=_HEALTH_CHECKS,
            )
        except Exception as error:
            # Ray has no type of its own for this.
            self.stop()
            raise StartupError(f"Ray does not start here: {error}") from error
        self.address: str = context.address_info["gcs_address"]


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
        socket.create_connection((host, int(port)), KNOCK_TIMEOUT_S).close()
    except OSError as error:
        raise StartupError(f"no Ray cluster answers at {address}: {error}") from error
