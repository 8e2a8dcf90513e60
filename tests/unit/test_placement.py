"""The planner: whatever the workers, a plan holds its promises or says what is short."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milliways.cluster.control.planner import (
    AttentionCut,
    Placement,
    PlacementPolicy,
    WorkerMemory,
    plan,
)
from milliways.cluster.host.model_bytes import checkpoint_bytes, released_bytes
from milliways.model.checkpoint import Checkpoint
from milliways.model.config import GROK_1
from milliways.model.demo import DEMO_DIR
from milliways.wire.errors import PlacementError
from milliways.wire.placement import ModelBytes

SMALL = ModelBytes(
    num_layers=4,
    num_experts=8,
    expert_bytes=10,
    attention_layer_bytes=3,
    end_bytes=5,
    kv_layer_bytes_per_token=1,
)
GROK = released_bytes(GROK_1, kv_value_bytes=2)


def workers_of(*sizes: int, nodes: str = "") -> list[WorkerMemory]:
    """Workers of these bytes; one node each, or the letters of `nodes`."""
    return [
        WorkerMemory(worker_id=f"w{i}", node_id=nodes[i] if nodes else f"n{i}", memory_bytes=size)
        for i, size in enumerate(sizes)
    ]


def policy(replicas: int = 1, cut: str = "auto", kv_tokens: int = 1) -> PlacementPolicy:
    return PlacementPolicy(
        expert_replicas=replicas, attention=AttentionCut(cut), kv_tokens=kv_tokens
    )


def check_plan(model: ModelBytes, placement: Placement, replicas: int) -> None:
    """What every plan promises."""
    held = Counter(expert_id for worker in placement.workers for expert_id in worker.experts)
    assert len(held) == model.num_layers * model.num_experts
    assert set(held.values()) == {replicas}
    layers = Counter[int]()
    for worker in placement.workers:
        assert len(set(worker.experts)) == len(worker.experts)
        assert worker.free_bytes >= 0
        shard = worker.attention
        layers.update(range(shard.first_layer, shard.first_layer + shard.num_layers))
    assert set(layers) == set(range(model.num_layers)) and len(set(layers.values())) == 1
    assert any(worker.attention.has_ends for worker in placement.workers)


def test_sizes_of_grok_1_are_those_of_the_release() -> None:
    """All arrays of the 770 files: 318.24 GB but for the pickle around them."""
    assert 318_239_000_000 < GROK.total_bytes < 318_239_886_140
    assert GROK.attention_bytes == pytest.approx(5.65e9, rel=0.01)
    assert GROK.kv_layer_bytes_per_token * GROK.num_layers == 262_144


def test_sizes_of_a_checkpoint_are_counted_from_its_files() -> None:
    with Checkpoint.open(DEMO_DIR) as checkpoint:
        sizes = checkpoint_bytes(checkpoint, kv_value_bytes=4)
        arrays = sum(array.num_bytes for record in checkpoint.records for array in record.arrays)
    assert sizes.total_bytes == arrays


@pytest.mark.parametrize(
    ("num_workers", "replicas", "cut"),
    [
        *((n, 1, cut) for n in (1, 2, 3, 4) for cut in ("replicated", "layers")),
        *((n, 2, cut) for n in (2, 3, 4) for cut in ("replicated", "layers")),
        *((n, replicas, "replicated") for n in (5, 8, 11) for replicas in (1, 2, 5)),
    ],
)
def test_every_expert_has_its_replicas(num_workers: int, replicas: int, cut: str) -> None:
    placement = plan(SMALL, workers_of(*[1000] * num_workers), policy(replicas, cut))
    check_plan(SMALL, placement, replicas)
    counts = [len(worker.experts) for worker in placement.workers]
    assert max(counts) - min(counts) <= 1


def test_every_layer_is_spread_over_the_workers() -> None:
    """A step waits for the busiest worker of each layer, so a layer must not pile up on one."""
    placement = plan(SMALL, workers_of(1000, 1000, 1000), policy())
    for layer in range(SMALL.num_layers):
        counts = [sum(e.layer == layer for e in worker.experts) for worker in placement.workers]
        assert max(counts) <= 3


def test_no_node_holds_all_replicas_of_an_expert() -> None:
    placement = plan(SMALL, workers_of(*[1000] * 4, nodes="aaab"), policy(2))
    check_plan(SMALL, placement, 2)
    for expert_id in {e for worker in placement.workers for e in worker.experts}:
        nodes = {w.worker.node_id for w in placement.workers if expert_id in w.experts}
        assert nodes == {"a", "b"}


def test_node_that_would_hold_all_replicas_is_refused() -> None:
    with pytest.raises(PlacementError, match="node 'a' would hold all replicas"):
        plan(SMALL, workers_of(1000, 1000, 30, nodes="aab"), policy(2))


def test_small_workers_are_filled_to_the_brim_and_the_rest_shared() -> None:
    # 4 * 3 + 4 * 1 + 5 = 21 bytes of attention, KV and ends on each.
    placement = plan(SMALL, workers_of(21 + 29, 1000, 1000), policy(cut="replicated"))
    check_plan(SMALL, placement, 1)
    assert [len(worker.experts) for worker in placement.workers] == [2, 15, 15]


def test_attention_is_cut_by_layers_where_copies_do_not_fit() -> None:
    placement = plan(GROK, workers_of(*[50_000_000_000] * 8), policy(kv_tokens=8192))
    check_plan(GROK, placement, 1)
    assert placement.workers[0].attention.num_layers == 64
    tight = plan(GROK, workers_of(*[45_000_000_000] * 8), policy(kv_tokens=8192))
    check_plan(GROK, tight, 1)
    assert [worker.attention.num_layers for worker in tight.workers] == [8] * 8
    assert [worker.attention.has_ends for worker in tight.workers] == [True] + [False] * 7


@pytest.mark.parametrize("cut", ["replicated", "layers"])
def test_workers_for_experts_only_have_no_attention(cut: str) -> None:
    """Their memory goes to experts; each expert has its replicas all the same."""
    workers = workers_of(*[1000] * 5)
    workers = [replace(worker, takes_attention=i > 1) for i, worker in enumerate(workers)]
    placement = plan(SMALL, workers, policy(2, cut))
    assert [worker.attention.num_layers > 0 for worker in placement.workers] == [
        False,
        False,
        True,
        True,
        True,
    ]
    for worker in placement.workers[:2]:
        assert not worker.attention.has_ends
        assert worker.used_bytes == len(worker.experts) * SMALL.expert_bytes > 0
    check_plan(SMALL, placement, 2)


def test_somebody_has_to_hold_attention() -> None:
    workers = [replace(worker, takes_attention=False) for worker in workers_of(1000, 1000)]
    with pytest.raises(PlacementError, match="no worker would hold attention"):
        plan(SMALL, workers, policy())


def test_refusal_does_the_arithmetic() -> None:
    with pytest.raises(PlacementError) as refusal:
        plan(GROK, workers_of(*[32_000_000_000] * 8), policy())
    assert str(refusal.value) == "needs 318.2 GB, has 8 x 32 GB: 62.2 GB short"


def test_refusal_of_replicas_says_what_takes_how_much() -> None:
    with pytest.raises(PlacementError, match=r"2 x 309\.\d GB of experts.*GB short"):
        plan(GROK, workers_of(*[60_000_000_000] * 8), policy(2))


@pytest.mark.parametrize(
    ("workers", "wanted", "reason"),
    [
        ([], policy(), "no workers"),
        (workers_of(1000, 1000), policy(3), "expert_replicas = 3"),
        (workers_of(1000), policy(0), "expert_replicas = 0"),
        (workers_of(1000), policy(kv_tokens=0), "kv_tokens = 0"),
        (workers_of(1000) * 2, policy(), "one worker_id"),
    ],
)
def test_what_makes_no_sense_is_refused(
    workers: list[WorkerMemory], wanted: PlacementPolicy, reason: str
) -> None:
    with pytest.raises(PlacementError, match=reason):
        plan(SMALL, workers, wanted)


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.integers(0, 500), min_size=1, max_size=9),
    replicas=st.integers(1, 3),
    cut=st.sampled_from(["auto", "replicated", "layers"]),
    num_nodes=st.integers(1, 4),
)
def test_any_workers_give_a_good_plan_or_a_reason(
    sizes: list[int], replicas: int, cut: str, num_nodes: int
) -> None:
    nodes = "".join("abcd"[i % num_nodes] for i in range(len(sizes)))
    try:
        placement = plan(SMALL, workers_of(*sizes, nodes=nodes), policy(replicas, cut))
    except PlacementError as error:
        assert str(error)
        return
    check_plan(SMALL, placement, replicas)
    if replicas > 1 and len(set(nodes)) > 1:
        for expert_id in {e for worker in placement.workers for e in worker.experts}:
            holders = {w.worker.node_id for w in placement.workers if expert_id in w.experts}
            assert len(holders) > 1
    assert placement == plan(SMALL, workers_of(*sizes, nodes=nodes), policy(replicas, cut))
