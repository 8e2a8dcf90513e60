"""The settings of a cluster: one frozen tree, built from a TOML file, Serve's arguments, or code.

    [model]      the model, and the number formats it is computed in
    [workers]    number of workers, their resources, the spread of experts and attention over them
    [router]     limits of queues and steps
    [ingress]    the addresses for clients, and limits on their requests
    [tls]        certificates for connections between hosts

Every field has a default. Names end in their unit if they have one.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_type_hints

from milliways.router.limits import DispatchLimits, RouterLimits
from milliways.wire import transports
from milliways.wire.errors import ConfigError
from milliways.wire.tls import TlsSettings

LOOPBACK = "127.0.0.1"

# The router's own classes define these defaults.
_ROUTER, _DISPATCH = RouterLimits(), DispatchLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """A model directory, or `demo`, and the number formats it is computed in."""

    path: str = "demo"
    # The model name that clients send; empty: the directory's name.
    name: str = ""
    dtype: str = "float32"
    activations: str = "exact"
    experts: str = "loaded"
    deterministic: bool = True
    # How a chat becomes a prompt. `declared`: by the model directory's chat_template.json; `plain`:
    # messages joined by newlines; `auto`: `declared` if that file exists, otherwise `plain`.
    chat_template: str = "auto"

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("model.activations", self.activations, ("exact", "int8"))
        _one_of("model.experts", self.experts, ("loaded", "mapped"))
        _one_of("model.chat_template", self.chat_template, ("auto", "declared", "plain"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The number of workers, the resources of each, and what each holds."""

    count: int = 3
    # Number of workers that hold each expert; 0: two, or one if there is a single worker.
    expert_replicas: int = 0
    attention: str = "auto"
    transport: str = transports.AUTO
    # A fraction below 1, or a whole number. Layers and experts are spread over several GPUs.
    gpus_each: float = 0.0
    cpus_each: float = 1.0
    # 0: all memory of the worker's GPUs; without GPUs an equal share of 80 % of the machine's.
    memory_gb_each: float = 0.0
    # Positions of KV cache on each attention shard; 0: eight times the model's context length.
    kv_tokens: int = 0
    block_size: int = 16
    # Copy full KV blocks of running sequences to another worker, which takes over after a death.
    kv_standby: bool = False
    # Compute threads of each worker on a CPU; 0: one for each of its CPUs.
    threads_each: int = 0
    # Extra Ray resources of each worker, for example {"accelerator_type:H100" = 0.001}.
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    # The first `experts_only` workers hold experts but no attention.
    experts_only: int = 0
    # Extra Ray resources of those workers, in place of `resources`.
    experts_only_resources: Mapping[str, float] = field(default_factory=dict[str, float])
    # Whether to compile every step size before a worker is ready.
    warm_up: bool = True
    load_timeout_s: float = 3600.0
    start_timeout_s: float = 600.0

    def resources_of(self, number: int) -> Mapping[str, float]:
        """The extra Ray resources of worker `number`."""
        return self.experts_only_resources if number < self.experts_only else self.resources

    def __post_init__(self) -> None:
        _between("workers.count", self.count, 1, 4096)
        _between("workers.expert_replicas", self.expert_replicas, 0, self.count)
        _between("workers.experts_only", self.experts_only, 0, self.count - 1)
        _one_of("workers.attention", self.attention, ("auto", "replicated", "layers"))
        _one_of("workers.transport", self.transport, transports.SETTINGS)
        _between("workers.gpus_each", self.gpus_each, 0, 1024)
        if self.gpus_each > 1 and self.gpus_each != round(self.gpus_each):
            raise ConfigError("workers.gpus_each", self.gpus_each, "a whole number if above 1")
        _between("workers.cpus_each", self.cpus_each, 0, 4096)
        _between("workers.memory_gb_each", self.memory_gb_each, 0, 1e6)
        _between("workers.kv_tokens", self.kv_tokens, 0, 2**31 - 1)
        _between("workers.block_size", self.block_size, 1, 4096)
        if self.kv_standby and self.attention == "layers":
            limit = "false if workers.attention is layers: copies need workers with all layers"
            raise ConfigError("workers.kv_standby", self.kv_standby, limit)
        _between("workers.threads_each", self.threads_each, 0, 256)
        _between("workers.load_timeout_s", self.load_timeout_s, 0.1, 1e6)
        _between("workers.start_timeout_s", self.start_timeout_s, 0.1, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Limits of a router's queue and of its steps."""

    max_running: int = _ROUTER.scheduler.max_running
    max_waiting: int = 256
    max_step_tokens: int = _ROUTER.scheduler.max_step_tokens
    max_micro_batches: int = _ROUTER.max_micro_batches
    # A smaller micro-batch is not worth another pass over the weights.
    min_micro_batch_tokens: int = _ROUTER.min_micro_batch_tokens
    # A call that takes several times its worker's recent worst latency is sent to a second replica
    # as well (a hedge). These are the bounds of that wait.
    hedge_after_s_min: float = _DISPATCH.hedge_after_s_min
    hedge_after_s: float = _DISPATCH.hedge_after_s
    # A call without a reply after this time has failed.
    step_timeout_s: float = _DISPATCH.timeout_s
    request_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _between("router.max_running", self.max_running, 1, 4096)
        _between("router.max_waiting", self.max_waiting, 0, 10**6)
        _between("router.max_step_tokens", self.max_step_tokens, 1, 65536)
        _between("router.max_micro_batches", self.max_micro_batches, 1, 8)
        _between("router.min_micro_batch_tokens", self.min_micro_batch_tokens, 1, 65536)
        _between("router.hedge_after_s_min", self.hedge_after_s_min, 0.001, self.hedge_after_s)
        _between("router.hedge_after_s", self.hedge_after_s, 0.001, 3600)
        _between("router.step_timeout_s", self.step_timeout_s, 0.01, 3600)
        _between("router.request_timeout_s", self.request_timeout_s, 0.1, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSettings:
    """The addresses for clients, the number of ingress replicas, and limits on requests."""

    host: str = LOOPBACK
    port: int = 8000
    grpc_port: int = 50051
    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: float = 16.0
    max_ongoing_requests: int = 256
    max_body_bytes: int = 4 << 20
    # If a router is silent for several times its recent longest silence, its requests go to a
    # second router as well (a hedge). These are the bounds of that wait.
    hedge_after_s_min: float = 0.1
    hedge_after_s_max: float = 60.0
    # How long running requests may take to end when a replica leaves or the cluster is stopped.
    grace_s: float = 120.0

    def __post_init__(self) -> None:
        _between("ingress.port", self.port, 0, 65535)
        _between("ingress.grpc_port", self.grpc_port, 0, 65535)
        _between("ingress.min_replicas", self.min_replicas, 1, 1024)
        _between("ingress.max_replicas", self.max_replicas, self.min_replicas, 1024)
        _between("ingress.target_ongoing_requests", self.target_ongoing_requests, 0.1, 1e6)
        _between("ingress.max_ongoing_requests", self.max_ongoing_requests, 1, 10**6)
        _between("ingress.max_body_bytes", self.max_body_bytes, 1024, 1 << 30)
        longest_s = self.hedge_after_s_max
        _between("ingress.hedge_after_s_min", self.hedge_after_s_min, 0.001, longest_s)
        _between("ingress.hedge_after_s_max", longest_s, 0.001, 3600)
        _between("ingress.grace_s", self.grace_s, 0, 86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """All settings of a cluster."""

    model: ModelSettings = field(default_factory=ModelSettings)
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    ingress: IngressSettings = field(default_factory=IngressSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)


def read_config(path: Path) -> ClusterConfig:
    """Reads a TOML file.

    Raises:
        ConfigError: the file is not TOML, or a field is invalid; see `config_from_tree`.
    """
    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), "", f"a readable TOML file: {error}") from error
    return config_from_tree(tree)


def config_from_tree(tree: Mapping[str, Any]) -> ClusterConfig:
    """Builds settings from nested mappings, such as parsed TOML or Serve's arguments.

    Raises:
        ConfigError: a field is invalid; the error names its table, the field, value and limit.
    """
    tables = {table.name: table.default_factory for table in fields(ClusterConfig)}
    settings: dict[str, Any] = {}
    for name, values in tree.items():
        make = tables.get(name, MISSING)
        if make is MISSING:
            raise ConfigError(name, values, f"one of the tables {', '.join(tables)}")
        if not isinstance(values, Mapping):
            raise ConfigError(name, values, "a table")
        settings[name] = _build(make, name, cast("Mapping[str, Any]", values))
    return ClusterConfig(**settings)


def _build(make: Any, table: str, values: Mapping[str, Any]) -> Any:
    kinds = get_type_hints(make)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            raise ConfigError(f"{table}.{name}", value, f"one of {', '.join(kinds)}")
        checked[name] = _coerce(f"{table}.{name}", value, kinds[name])
    return make(**checked)


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """Checks a value's type. The only conversion is from a whole number to a float."""
    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(arg for arg in get_args(kind) if arg is not NoneType)
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float, str, bool):
        if type(value) is not kind:
            raise ConfigError(name, value, f"of type {kind.__name__}")
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(name, value, "a table")
    return dict(cast("Mapping[str, Any]", value))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(name, value, f"one of {', '.join(allowed)}")


def _between(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(name, value, f"between {least:g} and {most:g}")
