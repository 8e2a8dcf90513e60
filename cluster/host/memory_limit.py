"""The memory that this process may use: the machine's, or the limit of its container (cgroup)."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Of a host's memory, workers use this much.
USABLE_PART = 0.8


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the smallest limit of the cgroups that this process is in."""
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine_bytes, *limits(root)])


def limits(root: Path = Path("/")) -> Iterator[int]:
    """The memory limits of this process's cgroups and of those around them, in bytes.

    `root` is the root of the file system, for tests.
    """
    for controllers, group in _groups(root):
        if not controllers:
            yield from _limits_up(root / "sys/fs/cgroup", group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_up(root / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes")


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """Controllers and path of each cgroup of this process; version 2 names no controllers."""
    with suppress(OSError, UnicodeDecodeError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, group = rest.partition(":")
            yield controllers, group


def _limits_up(top: Path, group: str, name: str) -> Iterator[int]:
    # A container may see its own cgroup as the top, under the path that the host knows: then only
    # the top exists.
    below = [part for part in group.split("/") if part not in ("", "..")]
    for depth in range(len(below) + 1):
        # Version 2 writes "max" for no limit, version 1 a number larger than any memory.
        with suppress(OSError, ValueError):
            yield int(top.joinpath(*below[:depth], name).read_text("utf-8"))
