"""Notes of the clusters that a user started, so that commands find them without an address.

The process that serves holds a lock on its note as long as it lives. The lock says the truth in
every process namespace of a machine, where process ids do not; and a note of another machine, which
shares the user's files, is left alone.
"""

import fcntl
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import psutil

from milliways.runtime.user_cache import user_cache_dir

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """Where a cluster of this user runs, and what commands need to join it."""

    pid: int
    address: str
    token: str
    http: str
    grpc: str
    # Which start of which machine it runs on.
    machine: str = ""
    boot: str = ""


class Owner(Enum):
    """What a note's lock says of the process that wrote it."""

    ALIVE = "alive"
    DEAD = "dead"
    # It may live on another machine.
    UNKNOWN = "unknown"


class Note:
    """A file that says where a cluster runs, locked as long as its owner lives."""

    def __init__(self, cluster: RunningCluster, folder: Path | None = None) -> None:
        """Writes it.

        Raises:
            OSError: there is no place for it.
        """
        folder = notes_dir() if folder is None else folder
        self.path = folder / f"{cluster.pid}.json"
        if self.path.exists() and owner_of(self.path) is not Owner.DEAD:
            # The same number, in another process namespace or on another machine.
            self.path = folder / f"{cluster.pid}-{os.urandom(4).hex()}.json"
        # Others see the name only when the lock is there.
        unnamed = self.path.with_suffix(".new")
        self._lock = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._lock, json.dumps(asdict(cluster)).encode())
        unnamed.rename(self.path)

    def delete(self) -> None:
        """Deletes it; commands do not find the cluster any more."""
        self.path.unlink(missing_ok=True)


def notes_dir() -> Path:
    """The folder of the notes. It exists.

    Raises:
        OSError: it cannot be made.
    """
    folder = user_cache_dir() / "running"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def this_machine() -> tuple[str, str]:
    """The name of this machine, and which of its starts this is."""
    try:
        boot = _BOOT_ID.read_text("utf-8").strip()
    except OSError:
        boot = ""
    return platform.node(), boot


def find_running() -> RunningCluster | None:
    """The cluster that this user started last on this machine and that still runs."""
    found: list[tuple[float, RunningCluster]] = []
    for path in notes_dir().glob("*.json"):
        cluster = _read(path)
        owner = owner_of(path)
        if owner is Owner.DEAD:
            path.unlink(missing_ok=True)
        elif owner is Owner.ALIVE and cluster is not None:
            with suppress(OSError):
                found.append((path.stat().st_mtime, cluster))
    return max(found, key=lambda entry: entry[0])[1] if found else None


def find_running_by(pid: int) -> RunningCluster | None:
    """The cluster that a process of this user started; None before it runs."""
    return _read(notes_dir() / f"{pid}.json")


def owner_of(path: Path) -> Owner:
    """Whether the process that wrote a note lives. A note that cannot be read has no owner."""
    cluster = _read(path)
    if cluster is None:
        return Owner.UNKNOWN
    machine, boot = this_machine()
    if cluster.boot != boot:
        # The machine has started anew since, or it is another machine.
        return Owner.DEAD if cluster.machine == machine else Owner.UNKNOWN
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return Owner.UNKNOWN
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Owner.ALIVE
    except OSError:
        # No locks on this file system: a process of that number is the best sign.
        return Owner.ALIVE if psutil.pid_exists(cluster.pid) else Owner.UNKNOWN
    finally:
        os.close(lock)
    return Owner.DEAD


def _read(path: Path) -> RunningCluster | None:
    try:
        return RunningCluster(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        # It is incomplete, or of another version.
        return None
