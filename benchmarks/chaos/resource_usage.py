"""Memory and file descriptors that a cluster uses while faults are injected.

A leak shows only after many faults. A process that dies frees what it leaked, so the figures are
sums over all processes of the cluster. The descriptors of Ray's log monitor are counted apart: it
holds open the logs of all processes that ever ran, up to 200, and then closes them.
"""

import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil

_LOG_MONITOR = "log_monitor.py"
# The share of samples at the beginning, and at the end, that `growth` compares.
_ENDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sums over all processes of a cluster at one moment. Memory is private memory only."""

    at_s: float
    num_processes: int
    memory_bytes: int
    num_descriptors: int
    # The descriptors of Ray's log monitor. `num_descriptors` does not include them.
    num_log_descriptors: int = 0


@contextmanager
def watched(root_pid: int | None, every_s: float = 10.0) -> Generator[list[Sample]]:
    """A list to which a thread adds samples; it stays empty if there is no root process."""
    samples: list[Sample] = []
    began_s, stopped = time.monotonic(), threading.Event()

    def watch(pid: int) -> None:
        while not stopped.wait(every_s):
            sample = take_sample(pid, time.monotonic() - began_s)
            if sample is not None:
                samples.append(sample)

    if root_pid is None:
        yield samples
        return
    thread = threading.Thread(target=watch, args=(root_pid,), name="resource-usage", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stopped.set()
        thread.join()


def take_sample(root_pid: int, at_s: float) -> Sample | None:
    """A sample of a process and its descendants; None if the process is gone."""
    try:
        root = psutil.Process(root_pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    memory, descriptors, log_descriptors, count = 0, 0, 0, 0
    for process in processes:
        try:
            used, held = process.memory_full_info().uss, process.num_fds()
            is_log_monitor = any(part.endswith(_LOG_MONITOR) for part in process.cmdline())
        except psutil.Error:
            # The process ended after it was listed.
            continue
        count += 1
        memory += used
        if is_log_monitor:
            log_descriptors += held
        else:
            descriptors += held
    return Sample(
        at_s=round(at_s, 1),
        num_processes=count,
        memory_bytes=memory,
        num_descriptors=descriptors,
        num_log_descriptors=log_descriptors,
    )


def growth(samples: Sequence[Sample]) -> Mapping[str, tuple[float, float]]:
    """The median of each figure at the beginning and at the end; empty if samples are too few."""
    num = int(_ENDS * len(samples))
    if num == 0:
        return {}

    def ends(of: Callable[[Sample], float]) -> tuple[float, float]:
        first, last = samples[:num], samples[-num:]
        return statistics.median(map(of, first)), statistics.median(map(of, last))

    return {
        "processes": ends(lambda s: s.num_processes),
        "memory, MB": ends(lambda s: s.memory_bytes / 1e6),
        "descriptors": ends(lambda s: s.num_descriptors),
        "descriptors of Ray's log monitor": ends(lambda s: s.num_log_descriptors),
    }


def format_growth(samples: Sequence[Sample]) -> str:
    """A line for a terminal; empty if samples are too few."""
    parts = [f"{name} {was:.0f} → {now:.0f}" for name, (was, now) in growth(samples).items()]
    if not parts:
        return ""
    return f"first fifth → last fifth of {len(samples)} samples: {'; '.join(parts)}"


def as_records(samples: Sequence[Sample]) -> list[dict[str, float]]:
    """The samples as dicts, to write to a file."""
    return [asdict(sample) for sample in samples]
