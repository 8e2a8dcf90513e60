"""Which worker holds what: a pure plan from sizes, memory and policy.

`plan` decides in this order:

1. Attention: all layers on every worker, or a run of layers on each (`AttentionCut`). What it and
   its KV cache leave free is for experts.
2. How many expert replicas each worker holds: as even as memory allows. No node may hold all
   replicas of an expert.
3. Which ones: dealt out of a circle in which the layers alternate.

A plan is data. Nothing here loads, starts or measures anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from milliways.wire.errors import PlacementError
from milliways.wire.placement import BYTES_PER_GB, AttentionRange, ExpertId, ModelBytes, ShardPlan

DEFAULT_KV_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """A worker to plan for: the memory it may use, and the node that it runs on."""

    worker_id: str
    node_id: str
    memory_bytes: int
    # Whether it may hold attention, and so route requests. Otherwise it has experts only.
    takes_attention: bool = True


class AttentionCut(Enum):
    """REPLICATED spreads sequences over workers, LAYERS sends a sequence through all of them.

    AUTO replicates where memory allows it.
    """

    AUTO = "auto"
    REPLICATED = "replicated"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPolicy:
    """How to place. `kv_tokens` are positions to keep room for on each attention shard.

    If `spread_nodes` is set, no node may hold all replicas of an expert, provided that there are at
    least two nodes and two replicas. If that is impossible, planning fails.
    """

    expert_replicas: int = 1
    attention: AttentionCut = AttentionCut.AUTO
    kv_tokens: int = DEFAULT_KV_TOKENS
    spread_nodes: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What one worker holds, and what that takes of its memory."""

    worker: WorkerMemory
    attention: AttentionRange
    experts: tuple[ExpertId, ...]
    attention_bytes: int
    kv_bytes: int
    end_bytes: int
    expert_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.attention_bytes + self.kv_bytes + self.end_bytes + self.expert_bytes

    @property
    def free_bytes(self) -> int:
        return self.worker.memory_bytes - self.used_bytes

    @property
    def shards(self) -> ShardPlan:
        """What the worker is to load: the plan without its arithmetic."""
        attention = self.attention
        return ShardPlan(
            first_layer=attention.first_layer,
            num_layers=attention.num_layers,
            has_ends=attention.has_ends,
            experts=frozenset(self.experts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A plan for each worker, in the order in which the workers were given."""

    workers: tuple[WorkerPlan, ...]
    placement_epoch: int = 1


def plan(
    model: ModelBytes,
    workers: Sequence[WorkerMemory],
    policy: PlacementPolicy,
    kept: Sequence[AttentionRange] | None = None,
) -> Placement:
    """Places a model on workers; equal inputs give equal plans.

    `kept` is the attention that stays where it is, one range for each worker.

    Raises:
        PlacementError: the workers cannot hold it. The message says how much memory is needed,
            available and missing.
    """
    _check(model, workers, policy)
    cuts = [kept] if kept else _attention_cuts(model, workers, policy.attention)
    for ranges in cuts:
        fixed = [fixed_bytes(model, attention, policy.kv_tokens) for attention in ranges]
        num_slots = _slots(model, workers, fixed)
        needed = model.num_layers * model.num_experts * policy.expert_replicas
        if num_slots is not None and sum(num_slots) >= needed:
            counts = _counts(workers, num_slots, needed, policy)
            held = _deal(model, workers, counts)
            return Placement(
                workers=tuple(
                    _worker_plan(model, worker, attention, experts, policy.kv_tokens)
                    for worker, attention, experts in zip(workers, ranges, held, strict=True)
                ),
            )
    raise PlacementError(_shortage(model, workers, policy))


def _check(model: ModelBytes, workers: Sequence[WorkerMemory], policy: PlacementPolicy) -> None:
    if not workers:
        raise PlacementError("there are no workers")
    ids = [worker.worker_id for worker in workers]
    if len(set(ids)) < len(ids):
        raise PlacementError("two workers have one worker_id")
    if not any(worker.takes_attention for worker in workers):
        raise PlacementError("no worker would hold attention: every worker is for experts only")
    if not 1 <= policy.expert_replicas <= len(workers):
        raise PlacementError(
            f"expert_replicas = {policy.expert_replicas}: between 1 and the number of workers,"
            f" {len(workers)}; two replicas on one worker would die together"
        )
    if policy.kv_tokens < 1:
        raise PlacementError(f"kv_tokens = {policy.kv_tokens}: at least 1")


def _attention_cuts(
    model: ModelBytes, workers: Sequence[WorkerMemory], cut: AttentionCut
) -> list[Sequence[AttentionRange]]:
    """The cuts to try, the best first."""
    whole = AttentionRange(first_layer=0, num_layers=model.num_layers, has_ends=True)
    num_takers = sum(worker.takes_attention for worker in workers)
    cuts: list[Sequence[AttentionRange]] = []
    if cut is not AttentionCut.LAYERS:
        cuts.append((whole,) * num_takers)
    if cut is not AttentionCut.REPLICATED:
        cuts.append(_cut_layers(model.num_layers, num_takers))
    return [_given_to_takers(model, workers, ranges) for ranges in cuts]


def _given_to_takers(
    model: ModelBytes, workers: Sequence[WorkerMemory], ranges: Sequence[AttentionRange]
) -> list[AttentionRange]:
    """A range for each worker: in their order for those that take one, an empty one for others."""
    left = iter(ranges)
    none = AttentionRange(first_layer=model.num_layers, num_layers=0, has_ends=False)
    return [next(left) if worker.takes_attention else none for worker in workers]


def _cut_layers(num_layers: int, num_workers: int) -> tuple[AttentionRange, ...]:
    """Ranges of nearly equal length.

    The first worker also has the output head, so a batch goes from the last worker back to the
    first for its logits.

    Workers beyond the number of layers have only experts.
    """
    ranges: list[AttentionRange] = []
    first = 0
    for i in range(num_workers):
        count = num_layers // num_workers + (i < num_layers % num_workers)
        ranges.append(AttentionRange(first_layer=first, num_layers=count, has_ends=i == 0))
        first += count
    return tuple(ranges)


def fixed_bytes(model: ModelBytes, attention: AttentionRange, kv_tokens: int) -> int:
    """What a worker needs before any expert: its attention and its KV cache."""
    kv_bytes = attention.num_layers * model.kv_layer_bytes_per_token * kv_tokens
    ends = model.end_bytes if attention.has_ends else 0
    return attention.num_layers * model.attention_layer_bytes + kv_bytes + ends


def _slots(
    model: ModelBytes, workers: Sequence[WorkerMemory], fixed: Sequence[int]
) -> list[int] | None:
    """How many experts fit beside each worker's attention; None if a worker cannot hold that.

    No worker holds an expert twice.
    """
    left = [w.memory_bytes - taken for w, taken in zip(workers, fixed, strict=True)]
    if min(left) < 0:
        return None
    most = model.num_layers * model.num_experts
    return [min(most, space // model.expert_bytes) for space in left]


def _counts(
    workers: Sequence[WorkerMemory],
    num_slots: Sequence[int],
    needed: int,
    policy: PlacementPolicy,
) -> list[int]:
    """How many experts each worker will hold: evenly, unless a node would then hold too many.

    A node may hold R - 1 of the R replicas of an expert. An even distribution can break this limit
    on one node only, which then gives its surplus to the others.
    """
    counts = _level(num_slots, needed)
    if not _must_spread(workers, policy):
        return counts
    most = needed // policy.expert_replicas * (policy.expert_replicas - 1)
    for node_id in dict.fromkeys(worker.node_id for worker in workers):
        here = [i for i, worker in enumerate(workers) if worker.node_id == node_id]
        elsewhere = [i for i, worker in enumerate(workers) if worker.node_id != node_id]
        if sum(counts[i] for i in here) <= most:
            continue
        if sum(num_slots[i] for i in elsewhere) < needed - most:
            raise PlacementError(
                f"node {node_id!r} would hold all replicas of an expert: the other nodes have room"
                f" for {sum(num_slots[i] for i in elsewhere)} of {needed - most} experts"
            )
        for group, total in ((here, most), (elsewhere, needed - most)):
            for i, count in zip(group, _level([num_slots[i] for i in group], total), strict=True):
                counts[i] = count
    return counts


def _must_spread(workers: Sequence[WorkerMemory], policy: PlacementPolicy) -> bool:
    num_nodes = len({worker.node_id for worker in workers})
    return policy.spread_nodes and policy.expert_replicas > 1 and num_nodes > 1


def _level(num_slots: Sequence[int], needed: int) -> list[int]:
    """Fills workers evenly until `needed` experts are placed; small workers may become full."""
    counts = [0] * len(num_slots)
    # From the smallest worker up: it takes its share of the rest, or all it can.
    for rank, i in enumerate(sorted(range(len(num_slots)), key=lambda i: num_slots[i])):
        share = -(-needed // (len(num_slots) - rank))
        counts[i] = min(num_slots[i], share)
        needed -= counts[i]
    assert needed == 0
    return counts


def _deal(
    model: ModelBytes, workers: Sequence[WorkerMemory], counts: Sequence[int]
) -> list[list[ExpertId]]:
    """Deals all experts in a circle, one round for each replica, worker after worker.

    A worker that is dealt no more experts than one round has gets none of them twice. The workers
    of a node follow one another, so a node that is dealt at most R - 1 rounds never has all R
    replicas of an expert.

    Neighbours in the circle are of different layers: a worker has as many experts of each layer as
    of any other, give or take one.
    """
    # Every `step`-th expert of a layer first, then those between. Other orders would be as even,
    # but a new version that plans otherwise would move the experts of a running cluster.
    step = max(1, round(model.num_layers * model.num_experts * len(workers) / sum(counts)))
    ranks = [rank for first in range(step) for rank in range(first, model.num_experts, step)]
    circle = [ExpertId(layer, rank) for rank in ranks for layer in range(model.num_layers)]
    held: list[list[ExpertId]] = [[] for _ in workers]
    place = 0
    for i in _node_after_node(workers):
        held[i] = [circle[(place + j) % len(circle)] for j in range(counts[i])]
        place += counts[i]
    return held


def _node_after_node(workers: Sequence[WorkerMemory]) -> list[int]:
    """The workers' places in the order of dealing: those of one node together."""
    nodes = list(dict.fromkeys(worker.node_id for worker in workers))
    return sorted(range(len(workers)), key=lambda i: nodes.index(workers[i].node_id))


def _worker_plan(
    model: ModelBytes,
    worker: WorkerMemory,
    attention: AttentionRange,
    experts: Sequence[ExpertId],
    kv_tokens: int,
) -> WorkerPlan:
    return WorkerPlan(
        worker=worker,
        attention=attention,
        experts=tuple(sorted(experts)),
        attention_bytes=attention.num_layers * model.attention_layer_bytes,
        kv_bytes=attention.num_layers * model.kv_layer_bytes_per_token * kv_tokens,
        end_bytes=model.end_bytes if attention.has_ends else 0,
        expert_bytes=len(experts) * model.expert_bytes,
    )


def _shortage(model: ModelBytes, workers: Sequence[WorkerMemory], policy: PlacementPolicy) -> str:
    """The calculation that a refusal shows.

    It is that of the weights alone if they do not fit, otherwise that of the whole plan."""
    has = sum(worker.memory_bytes for worker in workers)
    if model.total_bytes > has:
        return f"needs {_gb(model.total_bytes)}, has {_sizes(workers)}: " + (
            f"{_gb(model.total_bytes - has)} short"
        )
    ranges = _attention_cuts(model, workers, policy.attention)[-1]
    fixed = sum(fixed_bytes(model, attention, policy.kv_tokens) for attention in ranges)
    experts = policy.expert_replicas * model.all_experts_bytes
    sums = (
        f"needs {_gb(fixed + experts)} ({policy.expert_replicas} x {_gb(model.all_experts_bytes)}"
        f" of experts, {_gb(fixed)} of attention, embedding and KV cache), has {_sizes(workers)}"
    )
    if fixed + experts > has:
        return f"{sums}: {_gb(fixed + experts - has)} short"
    return f"{sums}: enough in all, but experts of {_gb(model.expert_bytes)} do not fit the gaps"


def _sizes(workers: Sequence[WorkerMemory]) -> str:
    """8 x 32 GB, or 4 x 80 GB + 4 x 40 GB."""
    sizes = [worker.memory_bytes for worker in workers]
    distinct = dict.fromkeys(sizes)
    return " + ".join(f"{sizes.count(size)} x {size / BYTES_PER_GB:g} GB" for size in distinct)


def _gb(num_bytes: int) -> str:
    if num_bytes < BYTES_PER_GB / 10:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / BYTES_PER_GB:.1f} GB"
