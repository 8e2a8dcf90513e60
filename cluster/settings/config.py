"""The settings of a cluster: one frozen tree, declared here and nowhere else.

    [model]      the model, and the number formats it is computed in
    [workers]    number of workers, their resources, the spread of experts and attention over them
    [router]     limits of queues and steps
    [ingress]    the addresses for clients, and limits on their requests
    [tls]        certificates for connections between hosts

Every field has a default. Names end in their unit if they have one. `sources` reads settings from
flags, the environment and files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milliways.cluster.settings.declaration import check, check_between, setting, setting_made_by
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

    path: str = setting("demo", "Model directory, or `demo`.")
    name: str = setting("", "Name that clients send; empty: the directory's name.")
    manifest: str = setting(
        "", "File of digests, from `milliways inspect --digest`; empty: the first load decides."
    )
    dtype: str = setting(
        "float32", "Format of activations and KV cache.", one_of=("float32", "bfloat16")
    )
    activations: str = setting(
        "exact",
        "What is multiplied with int8 weights: exact activations, or int8 ones, which are faster.",
        one_of=("exact", "int8"),
    )
    experts: str = setting(
        "loaded",
        "Experts are loaded into memory, or mapped from their files.",
        one_of=("loaded", "mapped"),
    )
    deterministic: bool = setting(
        True, "Whether a GPU gives a token the same bits in any batch; a CPU always does."
    )
    chat_template: str = setting(
        "auto",
        "How a chat becomes a prompt: declared: by the model directory's chat_template.jinja or"
        " tokenizer_config.json; plain: messages joined by newlines; auto: declared if one exists.",
        one_of=("auto", "declared", "plain"),
    )

    def __post_init__(self) -> None:
        check("model", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The number of workers, the resources of each, and what each holds."""

    count: int = setting(3, "Number of workers.", least=1, most=4096)
    expert_replicas: int = setting(
        0,
        "Number of workers that hold each expert; 0: two, or one if there is a single worker.",
        least=0,
        most=4096,
    )
    attention: str = setting(
        "auto",
        "replicated: each worker holds all attention layers; layers: each holds some;"
        " auto: replicated if memory allows.",
        one_of=("auto", "replicated", "layers"),
    )
    transport: str = setting(
        transports.AUTO,
        "How workers exchange rows: by gRPC, or by shared memory within a host.",
        one_of=transports.SETTINGS,
    )
    gpus_each: float = setting(
        0.0,
        "GPUs of each worker: a fraction below 1, or a whole number. Layers and experts are"
        " spread over several GPUs.",
        least=0,
        most=1024,
    )
    cpus_each: float = setting(1.0, "CPUs of each worker.", least=0, most=4096)
    memory_gb_each: float = setting(
        0.0,
        "Memory of each worker in GB; 0: all memory of its GPUs, or without GPUs an equal share"
        " of 80 % of the machine's.",
        least=0,
        most=1e6,
    )
    kv_tokens: int = setting(
        0,
        "Positions of KV cache on each attention shard; 0: eight times the model's context length.",
        least=0,
        most=2**31 - 1,
    )
    block_size: int = setting(16, "Positions in a KV block.", least=1, most=4096)
    kv_standby: bool = setting(
        False,
        "Copy full KV blocks of running sequences to another worker, which takes over after a"
        " death.",
    )
    threads_each: int = setting(
        0,
        "Compute threads of each worker on a CPU; 0: one for each of its CPUs.",
        least=0,
        most=256,
    )
    resources: Mapping[str, float] = setting_made_by(
        dict[str, float],
        'Extra Ray resources of each worker, such as {"accelerator_type:H100" = 0.001}.',
    )
    experts_only: int = setting(
        0,
        "This number of workers, the first ones, hold experts but no attention.",
        least=0,
        most=4096,
    )
    experts_only_resources: Mapping[str, float] = setting_made_by(
        dict[str, float], "Extra Ray resources of those workers, in place of `resources`."
    )
    warm_up: bool = setting(True, "Compile every step size before a worker is ready.")
    load_timeout_s: float = setting(
        3600.0, "Longest time to load a model, in seconds.", least=0.1, most=1e6
    )
    start_timeout_s: float = setting(
        600.0, "Longest time until workers have a process, in seconds.", least=0.1, most=1e6
    )

    def resources_of(self, number: int) -> Mapping[str, float]:
        """The extra Ray resources of worker `number`."""
        return self.experts_only_resources if number < self.experts_only else self.resources

    def __post_init__(self) -> None:
        check("workers", self)
        check_between("workers.expert_replicas", self.expert_replicas, 0, self.count)
        check_between("workers.experts_only", self.experts_only, 0, self.count - 1)
        if self.gpus_each > 1 and self.gpus_each != round(self.gpus_each):
            raise ConfigError("workers.gpus_each", self.gpus_each, "a whole number if above 1")
        if self.kv_standby and self.attention == "layers":
            limit = "false if workers.attention is layers: copies need workers with all layers"
            raise ConfigError("workers.kv_standby", self.kv_standby, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Limits of a router's queue and of its steps."""

    max_running: int = setting(
        _ROUTER.scheduler.max_running, "Sequences that run at a time.", least=1, most=4096
    )
    max_waiting: int = setting(256, "Sequences that may wait.", least=0, most=10**6)
    max_step_tokens: int = setting(
        _ROUTER.scheduler.max_step_tokens, "Tokens in a step.", least=1, most=65536
    )
    max_micro_batches: int = setting(
        _ROUTER.max_micro_batches,
        "Micro-batches of a step, where a step is not compiled as a whole, as it is on CPUs.",
        least=1,
        most=8,
    )
    min_micro_batch_tokens: int = setting(
        _ROUTER.min_micro_batch_tokens,
        "A smaller micro-batch is not worth another pass over the weights.",
        least=1,
        most=65536,
    )
    hedge_after_s_min: float = setting(
        _DISPATCH.hedge_after_s_min,
        "A call that takes several times its worker's recent worst latency is sent to a second"
        " replica too (a hedge). The shortest wait before that, in seconds.",
        least=0.001,
        most=3600,
    )
    hedge_after_s: float = setting(
        _DISPATCH.hedge_after_s,
        "The longest wait before a hedge, in seconds.",
        least=0.001,
        most=3600,
    )
    step_timeout_s: float = setting(
        _DISPATCH.timeout_s,
        "A call without a reply after this time has failed, in seconds.",
        least=0.01,
        most=3600,
    )
    request_timeout_s: float = setting(
        600.0, "Longest time of a request, in seconds.", least=0.1, most=1e6
    )

    def __post_init__(self) -> None:
        check("router", self)
        check_between("router.hedge_after_s_min", self.hedge_after_s_min, 0.001, self.hedge_after_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSettings:
    """The addresses for clients, the number of ingress replicas, and limits on requests."""

    host: str = setting(LOOPBACK, "Address to listen on.")
    port: int = setting(8000, "Port for HTTP.", least=0, most=65535)
    grpc_port: int = setting(50051, "Port for gRPC.", least=0, most=65535)
    min_replicas: int = setting(1, "Least number of ingress replicas.", least=1, most=1024)
    max_replicas: int = setting(4, "Greatest number of ingress replicas.", least=1, most=1024)
    target_ongoing_requests: float = setting(
        16.0,
        "Running requests for each replica, by which Serve adds replicas.",
        least=0.1,
        most=1e6,
    )
    max_ongoing_requests: int = setting(
        256, "Running requests of a replica; more are refused.", least=1, most=10**6
    )
    max_body_bytes: int = setting(4 << 20, "Bytes of a request.", least=1024, most=1 << 30)
    unknown_fields: str = setting(
        "ignore",
        "Fields of an HTTP request that nobody knows: ignore names them in a header of the"
        " response; refuse answers 400.",
        one_of=("ignore", "refuse"),
    )
    cors_origins: str = setting(
        "",
        "Origins whose pages may use the HTTP API in a browser, with spaces between; * for all,"
        " empty: none.",
    )
    hedge_after_s_min: float = setting(
        0.1,
        "If a router is silent for several times its recent longest silence, its requests go to a"
        " second router too (a hedge). The shortest wait before that, in seconds.",
        least=0.001,
        most=3600,
    )
    hedge_after_s_max: float = setting(
        60.0, "The longest wait before a hedge, in seconds.", least=0.001, most=3600
    )
    grace_s: float = setting(
        120.0,
        "Seconds that running requests have to end when a replica leaves or the cluster stops.",
        least=0,
        most=86400,
    )

    def __post_init__(self) -> None:
        check("ingress", self)
        check_between("ingress.max_replicas", self.max_replicas, self.min_replicas, 1024)
        longest_s = self.hedge_after_s_max
        check_between("ingress.hedge_after_s_min", self.hedge_after_s_min, 0.001, longest_s)


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
    from milliways.cluster.settings.sources import gather

    return gather(file=path).config


def config_from_tree(tree: Mapping[str, Any]) -> ClusterConfig:
    """Builds settings from nested mappings, such as parsed TOML or Serve's arguments.

    Raises:
        ConfigError: a field is invalid; the error names its table, the field, value and limit.
    """
    # Not earlier: pydantic takes a tenth of a second, and most processes receive their settings.
    from milliways.cluster.settings.sources import gather

    return gather(given=tree).config
