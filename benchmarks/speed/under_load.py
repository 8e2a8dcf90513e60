"""What the way to the client costs when several streams run at once.

At each number of streams, the same requests go to the router itself and over HTTP. The processor
time of the processes on the way is counted as well as the times of tokens.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

from milliways.benchmarks.speed.serving import Send, Timeline
from milliways.benchmarks.speed.table import format_number, format_table

# Seconds of processor time so far, by kind of process.
CpuSeconds = Callable[[], Mapping[str, float]]
PROXY, INGRESS, WORKERS = "proxy", "ingress", "workers"
KINDS = (PROXY, INGRESS, WORKERS)
_THREAD_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """All requests of a number of streams to one endpoint, and what they cost."""

    endpoint: str
    num_streams: int
    timelines: tuple[Timeline, ...]
    # From the first request to the end of the last one.
    seconds: float
    cpu_s: Mapping[str, float]

    @property
    def num_tokens(self) -> int:
        return sum(line.num_tokens for line in self.timelines)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def first_ms(self) -> tuple[float, float]:
        """Milliseconds to the first token: median and 99th percentile."""
        return _p50_and_p99([line.first_s for line in self.timelines])

    @property
    def gap_ms(self) -> tuple[float, float]:
        """Milliseconds between arrivals in one stream: median and 99th percentile."""
        gaps = [b - a for line in self.timelines for a, b in pairwise(line.arrivals_s)]
        return _p50_and_p99(gaps)

    def cpu_ms_per_token(self, kind: str) -> float:
        """Milliseconds of processor time of these processes, for each token."""
        return self.cpu_s[kind] * 1e3 / self.num_tokens

    def cpu_ms_per_request(self, kind: str) -> float:
        """Milliseconds of processor time of these processes, for each request."""
        return self.cpu_s[kind] * 1e3 / len(self.timelines)


def measure_load(
    endpoint: str, senders: Sequence[Send], num_rounds: int, cpu_seconds: CpuSeconds
) -> LoadFigures:
    """Each sender sends its requests one after another, all senders at the same time.

    The first request of each warms up and is not counted.

    Raises:
        RuntimeError: a request failed.
    """
    lines: list[Timeline] = []
    errors: list[Exception] = []
    are_warm = threading.Barrier(len(senders) + 1)

    def run(send: Send) -> None:
        try:
            send()
            are_warm.wait(_THREAD_TIMEOUT_S)
            for _ in range(num_rounds):
                lines.append(send())
        except Exception as error:
            errors.append(error)
            are_warm.abort()

    threads = [threading.Thread(target=run, args=(send,)) for send in senders]
    for thread in threads:
        thread.start()
    # A sender that fails breaks it.
    with suppress(threading.BrokenBarrierError):
        are_warm.wait(_THREAD_TIMEOUT_S)
    before, begin_s = cpu_seconds(), perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"a request failed: {errors[0]}") from errors[0]
    seconds, after = perf_counter() - begin_s, cpu_seconds()
    used = {kind: after.get(kind, 0.0) - before.get(kind, 0.0) for kind in KINDS}
    return LoadFigures(endpoint, len(senders), tuple(lines), seconds, used)


def format_load(figures: Sequence[LoadFigures]) -> str:
    """Two Markdown tables: what clients see, and what it costs."""
    seen = [
        [_title(one), format_number(one.tokens_per_s), *_pairs(one.first_ms, one.gap_ms)]
        for one in figures
    ]
    header = ["streams", "tokens/s", "first token, ms, p50 / p99", "gap, ms, p50 / p99"]
    costs = [
        [
            _title(one),
            *(f"{one.cpu_ms_per_request(kind):.2f}" for kind in KINDS),
            *(f"{one.cpu_ms_per_token(kind):.3f}" for kind in KINDS),
        ]
        for one in figures
    ]
    titles = [*(f"{kind}, a request" for kind in KINDS), *(f"{kind}, a token" for kind in KINDS)]
    return "\n\n".join(
        (format_table(header, seen), format_table(["processor time, ms", *titles], costs))
    )


def load_to_json(figures: Sequence[LoadFigures]) -> list[dict[str, Any]]:
    """The figures, times in milliseconds."""
    return [
        {
            "endpoint": one.endpoint,
            "streams": one.num_streams,
            "requests": len(one.timelines),
            "tokens_per_s": one.tokens_per_s,
            "first_ms_p50_p99": one.first_ms,
            "gap_ms_p50_p99": one.gap_ms,
            "cpu_ms_per_token": {kind: one.cpu_ms_per_token(kind) for kind in KINDS},
            "cpu_ms_per_request": {kind: one.cpu_ms_per_request(kind) for kind in KINDS},
        }
        for one in figures
    ]


def _title(one: LoadFigures) -> str:
    return f"{one.num_streams}, {one.endpoint}"


def _pairs(*values: tuple[float, float]) -> list[str]:
    return [f"{p50:.1f} / {p99:.1f}" for p50, p99 in values]


def _p50_and_p99(seconds: Sequence[float]) -> tuple[float, float]:
    if not seconds:
        return 0.0, 0.0
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return ordered[last // 2] * 1e3, ordered[round(last * 0.99)] * 1e3
