"""The folder of one run: Ray's sockets and logs.

The run removes it at its end. If the run is killed, a later one removes it: a lock on a file in the
folder says whether its owner lives, in whatever process namespace.
"""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from milliways.cluster.ray.haproxy import SOCKET_NAME
from milliways.wire.errors import StartupError

PREFIX = "mw-"
LOCK_NAME = "owner.lock"
# Of a Unix socket's name Linux takes 107 bytes; the rest is what we and Ray put behind the base.
_SOCKET_NAME_BYTES = 107
_OUR_NAME = f"/{PREFIX}12345678"
_RAYS_LONGEST_NAME = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
# HAProxy makes its socket under another name first. The folder has the name of a node.
_HAPROXYS_LONGEST_NAME = f"/{'0' * 56}/{SOCKET_NAME}.4194304.tmp"
MAX_BASE_BYTES = (
    _SOCKET_NAME_BYTES - len(_OUR_NAME) - max(len(_RAYS_LONGEST_NAME), len(_HAPROXYS_LONGEST_NAME))
)
_SHORT_BASES = ("/tmp", "/var/tmp", "/dev/shm")
_REMOVE_TIMEOUT_S = 2.0
_REMOVE_AGAIN_AFTER_S = 0.1


class RunFolder:
    """A temporary folder that belongs to this process as long as it lives."""

    def __init__(self) -> None:
        """Makes it, and removes the folders that dead runs of this user left.

        Raises:
            StartupError: no folder for temporary files is usable, and why.
        """
        base = choose_base(tempfile.gettempdir())
        remove_abandoned(base)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        # The lock comes before the name, so that another run sees no file without a lock.
        unnamed = self.path / f"{LOCK_NAME}.new"
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / LOCK_NAME)

    def remove(self) -> None:
        """Removes it with all that is in it. A process that just ends may still write there."""
        until_s = time.monotonic() + _REMOVE_TIMEOUT_S
        while self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            if time.monotonic() > until_s:
                return
            if self.path.exists():
                time.sleep(_REMOVE_AGAIN_AFTER_S)


def choose_base(wanted: str) -> str:
    """Where the folder may be: in `wanted` if Ray's sockets have short enough names there.

    Raises:
        StartupError: they have not, and no other place is usable.
    """
    length = len(os.fsencode(wanted))
    if length <= MAX_BASE_BYTES:
        return wanted
    for base in _SHORT_BASES:
        if os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
            return base
    raise StartupError(
        f"TMPDIR {wanted} has {length} bytes, and Unix sockets below it need a name of at most"
        f" {MAX_BASE_BYTES}: set TMPDIR to a shorter folder"
    )


def remove_abandoned(base: str) -> None:
    """Removes the folders of this user's runs whose process is dead."""
    for path in Path(base).glob(f"{PREFIX}*"):
        # Another run may remove it at the same time.
        with suppress(OSError):
            if not path.is_symlink() and path.stat().st_uid == os.getuid() and _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    """Whether the folder's owner is dead. Folders without our lock are not ours to judge."""
    try:
        lock = os.open(path / LOCK_NAME, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
