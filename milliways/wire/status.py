"""What a cluster says of itself: for `milliways status`, for metrics, and for tools that watch it.

Attributes have the names of the keys of the public JSON (`milliways status --json`), which do not
change. `to_json` and `from_json` are the one place where status becomes JSON and comes back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast, get_args, get_origin, get_type_hints

# The first one of a run of layers, and how many there are.
LayerRun = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """What lies on one device of a worker."""

    device: str
    layers: LayerRun
    has_ends: bool
    num_experts: int
    bytes: int
    # What it may be filled with; 0 where nobody limits it.
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchStatus:
    """Counts of a router's calls to experts, since the start."""

    resent_rows: int
    hedged_calls: int
    parked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus:
    """What a worker's router says of itself. Counts are since the start."""

    requests: int
    tokens: int
    # Over the last seconds.
    tokens_per_s: float
    # That went through the layers, or were to.
    positions: int
    steps: int
    replays: int
    active_requests: int
    running: int
    waiting: int
    placement_epoch: int
    kv_blocks_used: int
    kv_blocks_total: int
    # What carries the bytes to each worker, or why nothing does.
    transports: Mapping[str, str]
    dispatch: DispatchStatus
    # The worker that keeps copies of its KV blocks; empty where none does.
    standby: str
    standby_blocks_copied: int
    standby_bytes_copied: int
    standby_blocks_dropped: int
    # Of other routers.
    standby_blocks_kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """What a worker says of itself. Counts are since the start."""

    placement_epoch: int
    layers: LayerRun
    has_ends: bool
    num_experts: int
    devices: tuple[DeviceStatus, ...]
    # Of the checkpoint.
    bytes_read: int
    bytes_wanted: int
    calls: int
    merged_calls: int
    rows: int
    waiting_calls: int
    router: RouterStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What the controller knows of a worker, and what the worker says, where it answers."""

    worker_id: str
    incarnation: int
    pid: int
    state: str
    # In JSON its keys are among those of the worker.
    process: ProcessStatus | None
    role: str
    node: str
    address: str
    router_address: str
    # Empty where it waits for nothing.
    waits_for: str
    last_error: str
    quick_deaths: int
    # (layer, expert).
    experts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsStatus:
    """The settings that are declared, by name, and what is not so yet."""

    declared: Mapping[str, Any]
    # Since 1970; 0 where nobody declared them.
    declared_at_s: float
    # Those of `declared` that can be counted.
    observed: Mapping[str, Any]
    # In words; empty where everything is as declared.
    pending: tuple[str, ...]
    # What workers were started with where it is not declared so, by worker and name.
    by_worker: Mapping[str, Mapping[str, Any]]
    # Workers that have not confirmed the newest view, with which their routers take live settings,
    # and ingress replicas that run with other settings than are declared.
    unconfirmed: tuple[str, ...]
    # Why the last step failed, or a declaration was refused; empty where nothing did.
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStatus:
    """One of the generations of workers: there are two while a cluster changes to other workers."""

    generation: int
    model: str
    num_workers: int
    num_ready: int
    is_complete: bool
    serves: bool
    # Whether it serves, starts or ends, for people.
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """What the controller says of the cluster; all but `generations` is of the one that serves."""

    model: str
    placement_epoch: int
    is_complete: bool
    uptime_s: float
    deaths: int
    controller_pid: int
    settings: SettingsStatus
    workers: tuple[WorkerStatus, ...]
    generation: int = 1
    # By number.
    generations: tuple[GenerationStatus, ...] = ()


def to_json(status: ClusterStatus) -> dict[str, Any]:
    """Status as JSON's types."""
    return _written(status)


def from_json(values: Mapping[str, Any]) -> ClusterStatus:
    """What `to_json` made of a status."""
    return _read(ClusterStatus, values)


def _written(value: object) -> Any:
    if isinstance(value, tuple):
        return [_written(item) for item in cast("tuple[object, ...]", value)]
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, str]", value))
    if not is_dataclass(value):
        return value
    written: dict[str, Any] = {}
    for field in fields(value):
        of_field: object = getattr(value, field.name)
        if isinstance(of_field, ProcessStatus):
            written |= _written(of_field)
        elif field.name != "process":
            written[field.name] = _written(of_field)
    return written


def _read(kind: Any, value: Any) -> Any:
    if kind == ProcessStatus | None:
        return _read(ProcessStatus, value) if "router" in value else None
    if get_origin(kind) is tuple:
        first, last = get_args(kind)
        return tuple(_read(first, item) for item in value) if last is ... else tuple(value)
    if not is_dataclass(kind):
        return value
    # The keys of a process are among those of its worker.
    of_fields = {
        name: _read(of_field, value if name == "process" else value[name])
        for name, of_field in get_type_hints(kind).items()
    }
    return cast("Callable[..., Any]", kind)(**of_fields)
