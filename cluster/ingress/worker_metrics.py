"""The cluster's state as Prometheus text, from its status."""

from collections.abc import Callable, Iterator, Sequence

from milliways.wire.status import ClusterStatus, ProcessStatus, RouterStatus, WorkerStatus
from milliways.wire.view import WorkerState

# Name, kind and help text of a metric, and where its value is.
_WORKER_METRICS: tuple[tuple[str, str, str, Callable[[ProcessStatus], int]], ...] = (
    ("worker_calls_total", "counter", "Calls computed.", lambda w: w.calls),
    (
        "worker_merged_calls_total",
        "counter",
        "Calls that joined another's batch.",
        lambda w: w.merged_calls,
    ),
    ("worker_rows_total", "counter", "Rows that went through experts.", lambda w: w.rows),
)
_ROUTER_METRICS: tuple[tuple[str, str, str, Callable[[RouterStatus], int]], ...] = (
    ("sequences_running", "gauge", "Sequences that take part in steps.", lambda r: r.running),
    ("queue_length", "gauge", "Sequences that wait to be admitted.", lambda r: r.waiting),
    ("requests_active", "gauge", "Requests that have not ended.", lambda r: r.active_requests),
    ("kv_blocks_used", "gauge", "KV blocks that sequences hold.", lambda r: r.kv_blocks_used),
    ("kv_blocks_total", "gauge", "KV blocks that there are.", lambda r: r.kv_blocks_total),
    ("router_requests_total", "counter", "Requests admitted.", lambda r: r.requests),
    ("router_tokens_total", "counter", "Tokens drawn.", lambda r: r.tokens),
    (
        "router_positions_total",
        "counter",
        "Positions that went through the layers.",
        lambda r: r.positions,
    ),
    ("router_steps_total", "counter", "Steps.", lambda r: r.steps),
    (
        "router_replays_total",
        "counter",
        "Times that lost keys and values were computed again.",
        lambda r: r.replays,
    ),
    (
        "standby_blocks_copied_total",
        "counter",
        "KV blocks that the router's standby took in.",
        lambda r: r.standby_blocks_copied,
    ),
    (
        "standby_copied_bytes_total",
        "counter",
        "Bytes of keys and values that the router's standby took in.",
        lambda r: r.standby_bytes_copied,
    ),
    (
        "standby_blocks_dropped_total",
        "counter",
        "KV blocks that the standby refused, or that did not reach it before their sequence ended.",
        lambda r: r.standby_blocks_dropped,
    ),
    (
        "standby_blocks_kept_total",
        "counter",
        "KV blocks of other routers that this one took in.",
        lambda r: r.standby_blocks_kept,
    ),
)


def render_metrics(status: ClusterStatus) -> str:
    """Text in Prometheus' format; one line for each worker and figure."""
    lines = [*_family("placement_epoch", "gauge", "Version of the placement.")]
    lines.append(f"milliways_placement_epoch {status.placement_epoch}")
    lines += _family("worker_deaths_total", "counter", "Workers that died.")
    lines.append(f"milliways_worker_deaths_total {status.deaths}")
    lines += _states(status.workers)
    answers = [(w.worker_id, w.process) for w in status.workers if w.process is not None]
    for name, kind, text, read in _WORKER_METRICS:
        lines += _family(name, kind, text)
        lines += [_line(name, worker_id, read(process)) for worker_id, process in answers]
    for name, kind, text, read_router in _ROUTER_METRICS:
        lines += _family(name, kind, text)
        lines += [_line(name, worker_id, read_router(p.router)) for worker_id, p in answers]
    return "\n".join(lines) + "\n"


def _states(workers: Sequence[WorkerStatus]) -> Iterator[str]:
    yield from _family("worker_state", "gauge", "1 for the state that a worker is in.")
    for worker in workers:
        for state in WorkerState:
            is_in = int(worker.state == state.value)
            yield _line("worker_state", worker.worker_id, is_in, f',state="{state.value}"')


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP milliways_{name} {text}", f"# TYPE milliways_{name} {kind}"]


def _line(name: str, worker_id: str, value: int, more_labels: str = "") -> str:
    return f'milliways_{name}{{worker_id="{worker_id}"{more_labels}}} {value}'
