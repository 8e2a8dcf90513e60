"""What a change of a setting does to a running cluster: the table, and what follows from it.

Pure: settings are mappings from names to values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

Values = Mapping[str, Any]


class Effect(Enum):
    """How a running cluster takes another value; the values are texts for people."""

    LIVE = "live"
    # Each worker is drained and started again, one after another.
    BY_WORKER = "worker by worker"
    # Workers with the old value cannot compute for those with the new one.
    GENERATION = "as a new generation"
    # Connections and addresses of the whole cluster are made with it.
    START = "at the next start"


EFFECTS: Mapping[str, Effect] = {
    "model.path": Effect.GENERATION,
    "model.name": Effect.GENERATION,
    "model.manifest": Effect.GENERATION,
    "model.dtype": Effect.GENERATION,
    "model.activations": Effect.GENERATION,
    "model.experts": Effect.BY_WORKER,
    "model.deterministic": Effect.GENERATION,
    "model.chat_template": Effect.LIVE,
    "workers.count": Effect.LIVE,
    "workers.expert_replicas": Effect.LIVE,
    "workers.attention": Effect.GENERATION,
    "workers.transport": Effect.BY_WORKER,
    "workers.gpus_each": Effect.GENERATION,
    "workers.cpus_each": Effect.BY_WORKER,
    "workers.memory_gb_each": Effect.BY_WORKER,
    "workers.kv_tokens": Effect.BY_WORKER,
    # Copies of KV blocks go from worker to worker.
    "workers.block_size": Effect.GENERATION,
    "workers.kv_standby": Effect.BY_WORKER,
    "workers.threads_each": Effect.BY_WORKER,
    "workers.resources": Effect.BY_WORKER,
    "workers.experts_only": Effect.GENERATION,
    "workers.experts_only_resources": Effect.BY_WORKER,
    "workers.warm_up": Effect.BY_WORKER,
    "workers.load_timeout_s": Effect.LIVE,
    "workers.start_timeout_s": Effect.LIVE,
    "router.max_running": Effect.BY_WORKER,
    "router.max_waiting": Effect.LIVE,
    "router.max_step_tokens": Effect.BY_WORKER,
    "router.max_micro_batches": Effect.LIVE,
    "router.min_micro_batch_tokens": Effect.LIVE,
    "router.hedge_after_s_min": Effect.LIVE,
    "router.hedge_after_s": Effect.LIVE,
    "router.step_timeout_s": Effect.LIVE,
    "router.request_timeout_s": Effect.LIVE,
    "ingress.host": Effect.START,
    "ingress.port": Effect.START,
    "ingress.grpc_port": Effect.LIVE,
    "ingress.min_replicas": Effect.LIVE,
    "ingress.max_replicas": Effect.LIVE,
    "ingress.target_ongoing_requests": Effect.LIVE,
    "ingress.max_ongoing_requests": Effect.LIVE,
    "ingress.max_body_bytes": Effect.LIVE,
    "ingress.unknown_fields": Effect.LIVE,
    "ingress.cors_origins": Effect.LIVE,
    "ingress.hedge_after_s_min": Effect.LIVE,
    "ingress.hedge_after_s_max": Effect.LIVE,
    "ingress.grace_s": Effect.LIVE,
    "tls.ca_file": Effect.START,
    "tls.cert_file": Effect.START,
    "tls.key_file": Effect.START,
}
# Which model is served, with which bits and how it is cut: all workers of a generation, and an
# ingress that serves with them, have the same.
GENERATION = tuple(name for name, effect in EFFECTS.items() if effect is Effect.GENERATION)
BY_WORKER = tuple(name for name, effect in EFFECTS.items() if effect is Effect.BY_WORKER)
# What running routers take from a view.
OF_ROUTERS = tuple(
    name for name, effect in EFFECTS.items() if name.startswith("router.") and effect is Effect.LIVE
)
# What ingress replicas are built with, besides what they are told by the view.
OF_INGRESS = (
    "model.chat_template",
    "router.request_timeout_s",
    *(name for name in EFFECTS if name.startswith("ingress.")),
)


@dataclass(frozen=True, slots=True)
class Change:
    """Another value for a setting."""

    name: str
    before: Any
    after: Any

    @property
    def effect(self) -> Effect:
        return EFFECTS[self.name]

    @property
    def values(self) -> str:
        """Both values, for people."""
        return f"{self.name}: {self.before!r} -> {self.after!r}"

    def __str__(self) -> str:
        return f"{self.values} ({self.effect.value})"


def differences(
    before: Values, after: Values, names: Sequence[str] = tuple(EFFECTS)
) -> tuple[Change, ...]:
    """The settings that both have, with different values."""
    both = [name for name in names if name in before and name in after]
    return tuple(
        Change(name, before[name], after[name]) for name in both if before[name] != after[name]
    )


def refusal(changes: Sequence[Change], num_workers: int) -> str:
    """Why a running cluster cannot take these changes; empty if it can.

    Whether there is room for a new generation, if they need one, is another question.
    """
    later = [change.values for change in changes if change.effect is Effect.START]
    if later:
        return f"needs a new start of the cluster: {'; '.join(later)}"
    if anew(changes):
        # All workers are new ones.
        return ""
    by_worker = [change.values for change in changes if change.effect is Effect.BY_WORKER]
    if by_worker and num_workers < 2:
        return f"needs a second worker, which serves meanwhile: {'; '.join(by_worker)}"
    return ""


def anew(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Those of the changes that need a new generation of workers."""
    return tuple(change for change in changes if change.effect is Effect.GENERATION)


def is_same_generation(one: Values, other: Values) -> bool:
    """Whether workers with these settings can compute for each other."""
    return not differences(one, other, GENERATION)


def other_model(own: Values, declared: Values) -> str:
    """How the generation of an ingress differs from one that serves; empty if it does not."""
    changes = differences(own, declared, GENERATION)
    parts = [f"{c.name} is {c.before!r} here and {c.after!r} in the cluster" for c in changes]
    return "; ".join(parts)


def is_outdated(started_with: Values, declared: Values) -> bool:
    """Whether a worker must be started again to have the declared settings."""
    return bool(differences(started_with, declared, BY_WORKER))
