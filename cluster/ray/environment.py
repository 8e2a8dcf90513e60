"""The environment variables that Ray reads when it is imported.

This module does not import Ray, so the variables can be set before Ray reads them.
"""

import os
import secrets

from milliways.cluster.ray.running_clusters import RunningCluster
from milliways.cluster.settings.config import LOOPBACK

# Permits orders to workers to do something wrong, which cannot be caused from outside.
FAULTS_VARIABLE = "MILLIWAYS_FAULTS"


def be_quiet() -> None:
    """Switches off Ray's usage reports and its advice on the terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def be_patient() -> None:
    """Lets a busy machine start: Serve waits a minute for its proxy, Ray two for its own processes.

    By default Serve ends a proxy that is slower than five seconds.
    """
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")


def be_equal() -> None:
    """Lets the actors of a cluster started from here run at the priority of this process.

    By default Ray starts them at nice 15: any other program on the machine comes before them, and
    a process without privileges cannot take its priority back.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")


def watch_proxies() -> None:
    """Lets Serve replace a dead proxy after three seconds; by default it takes half a minute."""
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")


def guard_proxies() -> None:
    """Has Serve's proxies keep from the rest what the rest cannot take (`front_door.py`)."""
    os.environ.setdefault(
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "milliways.cluster.ray.front_door:middlewares"
    )


def drain_proxies_at_once() -> None:
    """Lets a proxy count as idle as soon as it is; by default half a minute must pass."""
    os.environ.setdefault("RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S", "0.01")


def stay_local() -> None:
    """Makes a cluster started from here listen on the loopback address only.

    Ray replaces the loopback address by the machine's address, unless it believes that this
    platform has no clusters; then it takes the address that it is given.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def make_token() -> str:
    """Makes a cluster started from here require a token; returns it.

    It is empty if the user configured Ray's authentication. Without it, Ray would write one token
    for all clusters to the user's home.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        use_token(secrets.token_hex(32))
    return os.environ.get("RAY_AUTH_TOKEN", "")


def enter(cluster: RunningCluster) -> None:
    """Prepares Ray, before it is imported, to join a cluster of this user."""
    use_token(cluster.token)
    head_for(cluster.address)


def head_for(address: str) -> None:
    """Prepares Ray, before it is imported, to look for a cluster at exactly this address.

    Otherwise Ray replaces the loopback address by the machine's address.
    """
    if address.startswith(f"{LOOPBACK}:"):
        stay_local()


def use_token(token: str) -> None:
    """Makes Ray present a token to the cluster that it joins."""
    if token:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = token
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
