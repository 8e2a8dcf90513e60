"""What each worker shall hold: from the workers that there are to the planner, and back."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cluster.errors import PlacementError
from cluster.fleet import WorkerRecord
from cluster.placement import (
    AttentionCut,
    AttentionShard,
    ModelBytes,
    PlacementPolicy,
    ShardPlan,
    WorkerMemory,
    plan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """What is wanted of the cluster."""

    num_workers: int
    policy: PlacementPolicy
    # 0: two where there are two workers, else one.
    expert_replicas: int = 0
    timeout_s: float = 5.0
    # So long new workers may take to have a process.
    start_timeout_s: float = 600.0


def make_settings(
    num_workers: int, expert_replicas: int, attention: str, kv_tokens: int
) -> ControllerSettings:
    """Settings of the controller from those of the cluster."""
    return ControllerSettings(
        num_workers=num_workers,
        expert_replicas=expert_replicas,
        policy=PlacementPolicy(attention=AttentionCut(attention), kv_tokens=kv_tokens),
    )


def planned(
    model: ModelBytes,
    settings: ControllerSettings,
    records: Collection[WorkerRecord],
    attention: Mapping[str, AttentionShard] | None = None,
) -> dict[str, ShardPlan]:
    """Shards for these workers, in the order of their numbers; `attention` are shards that stay.

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
            )
        )
    policy = PlacementPolicy(
        expert_replicas=settings.expert_replicas or min(2, len(workers)),
        attention=settings.policy.attention,
        kv_tokens=settings.policy.kv_tokens,
        spread_nodes=settings.policy.spread_nodes,
    )
    kept = [attention[worker.worker_id] for worker in workers] if attention else None
    placement = plan(model, workers, policy, attention=kept)
    return {w.worker.worker_id: ShardPlan.of(w) for w in placement.workers}


def planned_around_the_cut(
    model: ModelBytes, settings: ControllerSettings, records: Collection[WorkerRecord]
) -> dict[str, ShardPlan]:
    """As `planned`, with every shard of attention where its keys and values are; new ones get none.

    Raises:
        PlacementError: they cannot hold the model; says what is short.
    """
    none = AttentionShard(first_layer=model.num_layers, num_layers=0, has_ends=False)
    attention = {record.worker_id: none for record in records}
    for record in records:
        if record.shards is not None:
            attention[record.worker_id] = AttentionShard(
                first_layer=record.shards.first_layer,
                num_layers=record.shards.num_layers,
                has_ends=record.shards.has_ends,
            )
    return planned(model, settings, records, attention)


def is_cut(model: ModelBytes, records: Iterable[WorkerRecord]) -> bool:
    """Whether attention is cut by layers: then a sequence's keys and values bind its shards."""
    return any(
        record.shards is not None and 0 < record.shards.num_layers < model.num_layers
        for record in records
    )


def check_shrink(
    model: ModelBytes, records: Iterable[WorkerRecord], leaving: Iterable[WorkerRecord]
) -> None:
    """Raises PlacementError where one that leaves holds what no other can take over."""
    if not is_cut(model, records):
        return
    for record in leaving:
        if record.shards is not None and record.shards.num_layers > 0:
            raise PlacementError(
                f"{record.worker_id} holds layers of attention that no other worker has:"
                " where attention is cut by layers, only workers without any can leave"
            )


def split(
    records: Iterable[WorkerRecord], num_workers: int
) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
    """Those that stay when there shall be so many, and those that leave: the last ones."""
    in_order = sorted(records, key=number)
    staying = [record for record in in_order if number(record) < num_workers]
    return staying, [record for record in in_order if number(record) >= num_workers]


def number(record: WorkerRecord) -> int:
    """Of worker-7: 7."""
    return int(record.worker_id.rpartition("-")[2])
