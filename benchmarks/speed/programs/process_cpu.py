"""Processor time of a served cluster's processes, by what they do."""

from contextlib import suppress

import psutil

from milliways.benchmarks.speed.under_load import INGRESS, PROXY, WORKERS

# How the command lines of processes begin, or what they contain.
_KINDS = {
    "ray::ProxyActor": PROXY,
    "ray::HAProxyManager": PROXY,
    "bin/haproxy": PROXY,
    "ray::ServeReplica": INGRESS,
    "ray::WorkerActor": WORKERS,
}


def cpu_seconds(pid: int) -> dict[str, float]:
    """Seconds of processor time so far of all descendants of `milliways serve`, by kind."""
    total: dict[str, float] = {}
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            command, times = " ".join(process.cmdline()), process.cpu_times()
            kind = _kind(command)
            total[kind] = total.get(kind, 0.0) + times.user + times.system
    return total


def _kind(command: str) -> str:
    return next((kind for mark, kind in _KINDS.items() if mark in command), "other")
