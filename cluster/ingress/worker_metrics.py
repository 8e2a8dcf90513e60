"""The cluster's state as Prometheus text, from what `status` tells."""

from collections.abc import Iterator, Mapping
from typing import Any

from milliways.wire.view import WorkerState

_ROUTER_GAUGES = {
    "running": ("milliways_sequences_running", "Sequences that take part in steps."),
    "waiting": ("milliways_queue_length", "Sequences that wait to be admitted."),
    "active_requests": ("milliways_requests_active", "Requests that have not ended."),
    "kv_blocks_used": ("milliways_kv_blocks_used", "KV blocks that sequences hold."),
    "kv_blocks_total": ("milliways_kv_blocks_total", "KV blocks that there are."),
}
_ROUTER_COUNTERS = {
    "requests": ("milliways_router_requests_total", "Requests admitted."),
    "tokens": ("milliways_router_tokens_total", "Tokens drawn."),
    "positions": ("milliways_router_positions_total", "Positions that went through the layers."),
    "steps": ("milliways_router_steps_total", "Steps."),
    "replays": ("milliways_router_replays_total", "Times that keys and values were made anew."),
}
_STANDBY_COUNTERS = {
    "standby_blocks_copied": (
        "milliways_standby_blocks_copied_total",
        "KV blocks that the router's standby took in.",
    ),
    "standby_bytes_copied": (
        "milliways_standby_copied_bytes_total",
        "Bytes of keys and values that the router's standby took in.",
    ),
    "standby_blocks_dropped": (
        "milliways_standby_blocks_dropped_total",
        "KV blocks that the standby refused, or that were lost or not sent in time.",
    ),
    "standby_blocks_kept": (
        "milliways_standby_blocks_kept_total",
        "KV blocks of other routers that this one took in.",
    ),
}
_WORKER_COUNTERS = {
    "calls": ("milliways_worker_calls_total", "Calls computed."),
    "merged_calls": ("milliways_worker_merged_calls_total", "Calls that joined another's batch."),
    "rows": ("milliways_worker_rows_total", "Rows that went through experts."),
}


def render_metrics(status: Mapping[str, Any]) -> str:
    """Text in Prometheus' format; one line for each worker and figure."""
    lines = [*_family("milliways_placement_epoch", "gauge", "Version of the placement.")]
    lines.append(f"milliways_placement_epoch {status['placement_epoch']}")
    lines += _family("milliways_worker_deaths_total", "counter", "Workers that died.")
    lines.append(f"milliways_worker_deaths_total {status['deaths']}")
    workers: list[Mapping[str, Any]] = status["workers"]
    lines += _states(workers)
    for name, (metric, text) in _WORKER_COUNTERS.items():
        lines += _family(metric, "counter", text)
        lines += [f"{metric}{_labels(w)} {w[name]}" for w in workers if name in w]
    for table, kind in (
        (_ROUTER_GAUGES, "gauge"),
        (_ROUTER_COUNTERS, "counter"),
        (_STANDBY_COUNTERS, "counter"),
    ):
        for name, (metric, text) in table.items():
            lines += _family(metric, kind, text)
            lines += [f"{metric}{_labels(w)} {w['router'][name]}" for w in workers if "router" in w]
    return "\n".join(lines) + "\n"


def _states(workers: list[Mapping[str, Any]]) -> Iterator[str]:
    yield from _family("milliways_worker_state", "gauge", "1 for the state that a worker is in.")
    for worker in workers:
        for state in WorkerState:
            is_in = int(worker["state"] == state.value)
            labels = _labels(worker, f',state="{state.value}"')
            yield f"milliways_worker_state{labels} {is_in}"


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _labels(worker: Mapping[str, Any], more: str = "") -> str:
    return f'{{worker_id="{worker["worker_id"]}"{more}}}'
