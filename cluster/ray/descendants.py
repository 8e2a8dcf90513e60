"""Ends every process that this process started, and every process that those started."""

import ctypes
import os
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_KILL_AGAIN_AFTER_S = 0.1
_LOOK_AGAIN_AFTER_S = 0.01
# One more look, because a process may start another one while it is being killed.
_LOOKS_WITHOUT_ANY = 2


def adopt_orphans() -> None:
    """Makes descendants whose parent dies children of this process, on Linux.

    Otherwise nobody would know them any more: Ray's workers outlive their parent, the raylet.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> set[int]:
    """The process ids of this process and its descendants."""
    process = psutil.Process()
    return {process.pid, *(child.pid for child in process.children(recursive=True))}


def end_descendants(timeout_s: float) -> list[int]:
    """Kills all descendants, also those that start meanwhile; returns those that do not end.

    All of them are reaped: nobody else who started one learns its exit code any more.
    """
    until_s = time.monotonic() + timeout_s
    looks_without_any = 0
    while True:
        found = psutil.Process().children(recursive=True)
        running = [process for process in found if _runs(process)]
        looks_without_any = 0 if found else looks_without_any + 1
        if looks_without_any == _LOOKS_WITHOUT_ANY or time.monotonic() > until_s:
            return [process.pid for process in running]
        for process in running:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(running, timeout=_KILL_AGAIN_AFTER_S)
        _reap_all()
        time.sleep(_LOOK_AGAIN_AFTER_S)


def _reap_all() -> None:
    """Takes leave of all children that have ended; those of children that ended are ours now."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def reap_orphans(known: Collection[int]) -> None:
    """Reaps adopted children that have ended. Those in `known` have somebody who waits for them."""
    for child in psutil.Process().children():
        if child.pid not in known and not _runs(child):
            with suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
