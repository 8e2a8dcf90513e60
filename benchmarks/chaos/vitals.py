"""What a cluster takes of its machine while it is broken over and over: memory, descriptors.

A process that leaks shows only after many faults; those that die take their leaks with them, so
what is looked at is the sum over all processes of the cluster. Apart from it stands what Ray's log
monitor holds open: the log of every process that there was, until they are 200, then none.
"""

import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil

_LOG_MONITOR = "log_monitor.py"
# The share of all samples that stands for the beginning, and for the end.
_ENDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """All processes of a cluster at one moment; memory is what each has for itself."""

    at_s: float
    num_processes: int
    memory_bytes: int
    num_descriptors: int
    # Of Ray's log monitor, which are not among those.
    num_log_descriptors: int = 0


@contextmanager
def watched(root_pid: int | None, every_s: float = 10.0) -> Generator[list[Sample]]:
    """Samples as they come, from a thread of its own; none of nobody."""
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
    thread = threading.Thread(target=watch, args=(root_pid,), name="vitals", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stopped.set()
        thread.join()


def take_sample(root_pid: int, at_s: float) -> Sample | None:
    """Of a process and all that came of it; None where it is gone."""
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
            # It died since it was listed.
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
    """Of each figure the median at the beginning and at the end; empty with too few samples."""
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
        "those of Ray's log monitor": ends(lambda s: s.num_log_descriptors),
    }


def format_growth(samples: Sequence[Sample]) -> str:
    """A line for a terminal; empty with too few samples."""
    told = [f"{name} {was:.0f} → {now:.0f}" for name, (was, now) in growth(samples).items()]
    if not told:
        return ""
    return f"first fifth → last fifth of {len(samples)} samples: {'; '.join(told)}"


def as_records(samples: Sequence[Sample]) -> list[dict[str, float]]:
    """For a file."""
    return [asdict(sample) for sample in samples]
