"""The environment variables that Ray reads when it is imported, and where our cluster runs.

This module does not import Ray, so the variables can be set before Ray reads them.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from milliways.cluster.settings.config import LOOPBACK
from milliways.runtime.user_cache import user_cache_dir

# Permits orders to workers to do something wrong, which cannot be caused from outside.
FAULTS_VARIABLE = "MILLIWAYS_FAULTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """Where a cluster of this user runs, and what commands need to join it."""

    pid: int
    address: str
    token: str
    http: str
    grpc: str


def be_quiet() -> None:
    """Switches off Ray's usage reports and its advice on the terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def be_patient() -> None:
    """Lets Serve wait a minute for its proxy; by default it ends a slow one after five seconds."""
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")


def watch_proxies() -> None:
    """Lets Serve replace a dead proxy after three seconds; by default it takes half a minute."""
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")


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


def remember(cluster: RunningCluster) -> Path:
    """Writes a file that says where a cluster runs; returns it, to be deleted at its end."""
    folder = user_cache_dir() / "running"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{cluster.pid}.json"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(cluster), file)
    return path


def find_running() -> RunningCluster | None:
    """The cluster that this user started last and that still runs."""
    found: list[tuple[float, RunningCluster]] = []
    for path in (user_cache_dir() / "running").glob("*.json"):
        cluster = _read(path)
        if cluster is None:
            continue
        if psutil.pid_exists(cluster.pid):
            found.append((path.stat().st_mtime, cluster))
        else:
            path.unlink(missing_ok=True)
    return max(found, key=lambda entry: entry[0])[1] if found else None


def find_running_by(pid: int) -> RunningCluster | None:
    """The cluster that a process of this user started; None before it runs."""
    return _read(user_cache_dir() / "running" / f"{pid}.json")


def _read(path: Path) -> RunningCluster | None:
    try:
        return RunningCluster(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        # It is incomplete, or of another version.
        return None
