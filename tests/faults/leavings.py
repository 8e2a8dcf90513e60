"""What a test that breaks the shared cluster has to leave: the same processes, and nothing held."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.served_cluster import ServedCluster, wait_until

# What a fault may end, and has to be there again, as often as before.
OURS = ("ray::WorkerActor", "ray::ControllerActor", "ray::ServeReplica", "ray::ProxyActor")
SEGMENT = "/memfd:milliways"
BACK_TIMEOUT_S = 120.0


def actors(cluster: ServedCluster) -> list[str]:
    """What runs of ours in the cluster, by name."""
    return sorted(title(process) for process in processes_of(cluster, *OURS))


def processes_of(cluster: ServedCluster, *names: str) -> list[psutil.Process]:
    """Those whose title begins like this."""
    return [process for process in cluster.processes() if title(process).startswith(names)]


def title(process: psutil.Process) -> str:
    """What a process calls itself; nothing where it is gone."""
    try:
        # Ray appends the method that an actor runs.
        return " ".join(process.cmdline()[:1]).partition(".")[0]
    except psutil.Error:
        return ""


def segments(cluster: ServedCluster) -> dict[str, int]:
    """How many processes have each piece of shared memory mapped, by inode."""
    mappers: dict[str, set[int]] = {}
    for process in cluster.processes():
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text("utf-8").splitlines()
        except OSError:
            continue
        for line in lines:
            _, _, _, _, inode, *path = line.split()
            if path[:1] == [SEGMENT]:
                mappers.setdefault(inode, set()).add(process.pid)
    return {inode: len(pids) for inode, pids in mappers.items()}


@contextmanager
def left_as_found(cluster: ServedCluster) -> Iterator[None]:
    """Afterwards the same processes are there, all well, and nothing is held."""
    before = actors(cluster)
    yield
    wait_until(cluster.is_ready, "the cluster is ready", BACK_TIMEOUT_S)
    wait_until(
        lambda: actors(cluster) == before, "every process has come back, once", BACK_TIMEOUT_S
    )
    wait_until(lambda: sum(cluster.metric("milliways_kv_blocks_used")) == 0, "all blocks are free")
    # A router and its worker: what only one has, it keeps of another that died.
    wait_until(lambda: set(segments(cluster).values()) == {2}, "no shared memory is left over")
    wait_until(lambda: sum(cluster.metric("milliways_ongoing_requests")) == 0, "nobody is served")
