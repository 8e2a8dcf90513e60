"""What each worker is to hold: from the workers that there are to the planner, and back."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from milliways.cluster.control.fleet import number_of
from milliways.cluster.control.planner import (
    AttentionCut,
    PlacementPolicy,
    WorkerMemory,
    fixed_bytes,
    plan,
)
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.errors import PlacementError
from milliways.wire.placement import BYTES_PER_GB, AttentionRange, ExpertId, ModelBytes, ShardPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """What is wanted of the cluster."""

    num_workers: int
    policy: PlacementPolicy
    # 0 means two replicas if there are at least two workers, else one.
    expert_replicas: int = 0
    timeout_s: float = 5.0
    # How long new workers may take to have a process.
    start_timeout_s: float = 600.0
    # Workers with lower numbers hold experts and no attention.
    experts_only: int = 0
    # Positions of KV cache where the settings name none; 0: those of `policy`.
    default_kv_tokens: int = 0


def make_settings(
    num_workers: int,
    expert_replicas: int,
    attention: str,
    kv_tokens: int,
    start_timeout_s: float = 600.0,
    experts_only: int = 0,
    default_kv_tokens: int = 0,
) -> ControllerSettings:
    """Settings of the controller from those of the cluster."""
    return ControllerSettings(
        num_workers=num_workers,
        expert_replicas=expert_replicas,
        policy=PlacementPolicy(attention=AttentionCut(attention), kv_tokens=kv_tokens),
        start_timeout_s=start_timeout_s,
        experts_only=experts_only,
        default_kv_tokens=default_kv_tokens,
    )


# Settings of the cluster that are settings of the controller, by name.
_DECLARED = {
    "workers.count": "num_workers",
    "workers.expert_replicas": "expert_replicas",
    "workers.start_timeout_s": "start_timeout_s",
}


def with_declared(settings: ControllerSettings, values: Mapping[str, Any]) -> ControllerSettings:
    """Settings with the values that are declared."""
    known = {field: values[name] for name, field in _DECLARED.items() if name in values}
    policy = replace(settings.policy, kv_tokens=_kv_tokens(settings, values))
    return replace(settings, policy=policy, **known)


def _kv_tokens(settings: ControllerSettings, values: Mapping[str, Any]) -> int:
    wanted = values.get("workers.kv_tokens", 0)
    return wanted or settings.default_kv_tokens or settings.policy.kv_tokens


def misfit(
    model: ModelBytes,
    settings: ControllerSettings,
    records: Collection[WorkerRecord],
    values: Mapping[str, Any],
) -> str:
    """Which worker could not hold what it is to hold with these settings; empty if all could."""
    kv_tokens = _kv_tokens(settings, values)
    limit_bytes = round(values.get("workers.memory_gb_each", 0.0) * BYTES_PER_GB)
    for record in records:
        if record.shards is None or record.spawned is None:
            continue
        needed = fixed_bytes(model, attention_of(record.shards), kv_tokens)
        needed += len(record.shards.experts) * model.expert_bytes
        memory_bytes = limit_bytes or record.spawned.memory_bytes
        if needed > memory_bytes:
            has = f"{memory_bytes / BYTES_PER_GB:g} GB"
            return f"{record.worker_id} needs {needed / BYTES_PER_GB:g} GB and would have {has}"
    return ""


def used_bytes(
    model: ModelBytes, settings: ControllerSettings, records: Iterable[WorkerRecord]
) -> Counter[str]:
    """How much memory workers use on each node, by the plan."""
    used: Counter[str] = Counter()
    for record in records:
        if record.shards is not None and record.spawned is not None:
            fixed = fixed_bytes(model, attention_of(record.shards), settings.policy.kv_tokens)
            num_experts = len(record.shards.experts | record.held)
            used[record.spawned.node_id] += fixed + num_experts * model.expert_bytes
    return used


def num_replicas(settings: ControllerSettings, num_workers: int) -> int:
    """How many workers hold each expert."""
    return settings.expert_replicas or min(2, num_workers)


def planned(
    model: ModelBytes,
    settings: ControllerSettings,
    records: Collection[WorkerRecord],
    attention: Mapping[str, AttentionRange] | None = None,
) -> dict[str, ShardPlan]:
    """Shards for these workers, in the order of their numbers; `attention` is what stays.

    Raises:
        PlacementError: they cannot hold the model; says what is short.
    """
    workers: list[WorkerMemory] = []
    for record in sorted(records, key=number):
        assert record.spawned is not None
        workers.append(
            WorkerMemory(
                worker_id=record.worker_id,
                node_id=record.spawned.node_id,
                memory_bytes=record.spawned.memory_bytes,
                takes_attention=number(record) >= settings.experts_only,
            )
        )
    policy = PlacementPolicy(
        expert_replicas=num_replicas(settings, len(workers)),
        attention=settings.policy.attention,
        kv_tokens=settings.policy.kv_tokens,
        spread_nodes=settings.policy.spread_nodes,
    )
    kept = [attention[worker.worker_id] for worker in workers] if attention else None
    placement = plan(model, workers, policy, kept)
    return {w.worker.worker_id: w.shards for w in placement.workers}


def planned_anew(
    model: ModelBytes, settings: ControllerSettings, records: Collection[WorkerRecord]
) -> dict[str, ShardPlan]:
    """As `planned`, for workers of which some have shards: attention stays with its KV cache.

    If every worker that has attention has all of it, new workers get all of it too. If attention is
    cut by layers, new workers get none.

    Raises:
        PlacementError: they cannot hold the model; says what is short.
    """
    shards = {r.worker_id: r.shards for r in records if r.shards is not None}
    if not shards:
        return planned(model, settings, records)
    if not is_cut(model, records):
        policy = replace(settings.policy, attention=AttentionCut.REPLICATED)
        return planned(model, replace(settings, policy=policy), records)
    none = AttentionRange(first_layer=model.num_layers, num_layers=0, has_ends=False)
    attention = {record.worker_id: none for record in records}
    attention |= {worker_id: attention_of(those) for worker_id, those in shards.items()}
    return planned(model, settings, records, attention)


def shared_out(
    model: ModelBytes,
    settings: ControllerSettings,
    records: Collection[WorkerRecord],
    experts: Collection[ExpertId],
) -> dict[str, set[ExpertId]]:
    """Which workers take over which experts: always the one with fewest, if its memory has room."""
    shares: dict[str, set[ExpertId]] = {record.worker_id: set() for record in records}
    held = {record.worker_id: len(record.held) for record in records}
    room = {record.worker_id: _experts_that_fit(model, settings, record) for record in records}
    for expert_id in sorted(experts):
        open_to = [worker_id for worker_id in shares if held[worker_id] < room[worker_id]]
        if not open_to:
            break
        least = min(open_to, key=lambda worker_id: held[worker_id])
        shares[least].add(expert_id)
        held[least] += 1
    return shares


def _experts_that_fit(model: ModelBytes, settings: ControllerSettings, record: WorkerRecord) -> int:
    assert record.spawned is not None and record.shards is not None
    fixed = fixed_bytes(model, attention_of(record.shards), settings.policy.kv_tokens)
    return (record.spawned.memory_bytes - fixed) // model.expert_bytes


def experts_of(model: ModelBytes) -> set[ExpertId]:
    """All experts of a model."""
    return {
        ExpertId(layer, expert)
        for layer in range(model.num_layers)
        for expert in range(model.num_experts)
    }


def attention_of(shards: ShardPlan) -> AttentionRange:
    """The range of attention layers among a worker's shards."""
    return AttentionRange(
        first_layer=shards.first_layer, num_layers=shards.num_layers, has_ends=shards.has_ends
    )


def is_cut(model: ModelBytes, records: Iterable[WorkerRecord]) -> bool:
    """Whether attention is cut by layers: then a sequence needs all shards of its chain."""
    return any(
        record.shards is not None and 0 < record.shards.num_layers < model.num_layers
        for record in records
    )


def check_shrink(
    model: ModelBytes, records: Iterable[WorkerRecord], leaving: Iterable[WorkerRecord]
) -> None:
    """Raises PlacementError if a worker that leaves holds attention that no other can replace."""
    records, leaving = list(records), list(leaving)
    attending = [r for r in records if r.shards is not None and r.shards.num_layers > 0]
    stays_any = len(leaving) < len(records)
    if stays_any and attending and all(record in leaving for record in attending):
        names = ", ".join(record.worker_id for record in attending)
        raise PlacementError(f"no other worker holds attention: {names} cannot leave")
    if not is_cut(model, records):
        return
    for record in leaving:
        if record.shards is not None and record.shards.num_layers > 0:
            raise PlacementError(
                f"{record.worker_id} holds layers of attention that no other worker has:"
                " where attention is cut by layers, only workers without any can leave"
            )


def split_workers(
    records: Iterable[WorkerRecord], num_workers: int
) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
    """The workers that stay when there are to be `num_workers`, and those that leave: the last."""
    in_order = sorted(records, key=number)
    staying = [record for record in in_order if number(record) < num_workers]
    return staying, [record for record in in_order if number(record) >= num_workers]


def number(record: WorkerRecord) -> int:
    """Of worker-7: 7."""
    return number_of(record.worker_id)


def misplaced(
    model: ModelBytes, settings: ControllerSettings, records: Collection[WorkerRecord]
) -> str:
    """Why the workers that stay cannot hold the model with these settings; empty if they can.

    Of workers that are still to come, nobody knows the memory.
    """
    num_wanted = settings.num_workers
    staying, leaving = list(records), list[WorkerRecord]()
    if num_wanted != len(staying):
        staying, leaving = split_workers(records, num_wanted)
    if len(staying) < num_wanted or any(record.spawned is None for record in staying):
        return ""
    try:
        check_shrink(model, records, leaving)
        planned_anew(model, settings, staying)
    except PlacementError as error:
        return str(error)
    return ""
