"""Checks that a test of faults leaves the shared cluster as it was, and no resource held."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.served_cluster import ServedCluster, wait_until

# Processes that a fault may end. Afterwards there must be the same number of each.
OURS = (
    *("ray::WorkerActor", "ray::ControllerActor", "ray::ServeReplica"),
    *("ray::HAProxyManager", "ray::ProxyActor"),
)
SEGMENT, BELL = "/memfd:milliways", "/memfd:milliways-bell"
BACK_TIMEOUT_S = 120.0


def actors(cluster: ServedCluster) -> list[str]:
    """Names of our actors in the cluster."""
    return sorted(title(process) for process in processes_of(cluster, *OURS))


def processes_of(cluster: ServedCluster, *names: str) -> list[psutil.Process]:
    """Processes whose title begins with one of these names."""
    return [process for process in cluster.processes() if title(process).startswith(names)]


def title(process: psutil.Process) -> str:
    """A process's title; empty if it has ended."""
    try:
        # Ray appends the method that an actor runs.
        return " ".join(process.cmdline()[:1]).partition(".")[0]
    except psutil.Error:
        return ""


def mapped(cluster: ServedCluster, name: str) -> dict[str, int]:
    """For each shared file of this name, by inode, the number of processes that map it."""
    mappers: dict[str, set[int]] = {}
    for process in cluster.processes():
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text("utf-8").splitlines()
        except OSError:
            continue
        for line in lines:
            _, _, _, _, inode, *path = line.split()
            if path[:1] == [name]:
                mappers.setdefault(inode, set()).add(process.pid)
    return {inode: len(pids) for inode, pids in mappers.items()}


@contextmanager
def left_as_found(cluster: ServedCluster) -> Iterator[None]:
    """Waits afterwards until the same processes run, are healthy, and hold nothing."""
    before = actors(cluster)
    yield
    wait_until(cluster.is_ready, "the cluster is ready", BACK_TIMEOUT_S)
    wait_until(lambda: actors(cluster) == before, "every process runs again, once", BACK_TIMEOUT_S)
    wait_until(lambda: sum(cluster.metric("milliways_kv_blocks_used")) == 0, "all blocks are free")
    # Each segment belongs to a router and a worker. One with a single mapping is left from a death.
    wait_until(
        lambda: set(mapped(cluster, SEGMENT).values()) == {2}, "no shared memory is left over"
    )
    # Each worker has one; its peers map it too, and must have forgotten those of the dead.
    num_workers = len(processes_of(cluster, "ray::WorkerActor"))
    wait_until(lambda: len(mapped(cluster, BELL)) == num_workers, "no bell is left over")
    wait_until(lambda: sum(cluster.metric("milliways_ongoing_requests")) == 0, "no request runs")
