"""However a model is spread, requests get the tokens and log-probabilities of one process.

All cells use three layers, which the planner can cut in every way that matters: programs are few,
and compiling them is most of the time. One goes through twelve.
"""

import dataclasses
from pathlib import Path

import pytest

from cluster.model_bytes import checkpoint_bytes
from cluster.placement import AttentionCut
from model.checkpoint import Checkpoint
from router.admission import RoutedRequest
from router.request import GenerateRequest
from router.scheduler import SchedulerLimits
from router.sequence import NoText
from tests.memory_cluster import ClusterSettings, Heard, MemoryCluster, all_ended
from tests.shards import ShardFactory, place, view_of
from tests.spreads import CACHE, DTYPES, SPREADS, Spread, Told, alone, by_sample, requests


def served(cluster: MemoryCluster, wanted: list[GenerateRequest], at_a_time: int) -> list[Told]:
    """What the cluster tells, requests joining while others run."""
    routers = sorted(cluster.routers)
    heard: dict[str, Heard] = {}
    for i, request in enumerate(wanted):
        routed = RoutedRequest(request_id=str(i), request=request, timeout_s=1e6)
        heard[str(i)] = cluster.submit(routers[i % len(routers)], str(i), routed)
        cluster.run_until(lambda: sum(not h.has_ended for h in heard.values()) < at_a_time, 1e6)
    cluster.run_until(lambda: all_ended(heard), 1e6)
    assert [one.error for one in heard.values()] == [None] * len(wanted)
    cluster.settle()
    cluster.close()
    return [by_sample(one.events) for one in heard.values()]


def make_cluster(
    model_dir: Path, spread: Spread, settings: ClusterSettings, dtype: str = "float32"
) -> MemoryCluster:
    """A cluster in which every worker has read its own bytes of the checkpoint, and no others."""
    placement = place(model_dir, spread.num_workers, spread.replicas, spread.cut)
    view = view_of(placement)
    with Checkpoint.open(model_dir) as checkpoint:
        config, sizes = checkpoint.config, checkpoint_bytes(checkpoint, 4)
    factory = ShardFactory(model_dir, settings.cache_size, dtype)
    cluster = MemoryCluster(
        config,
        settings,
        lambda member, process: factory(member, process.tasks),
        view,
        lambda request: NoText(),
    )
    for worker in placement.workers:
        shard = worker.attention
        wanted = shard.num_layers * sizes.attention_layer_bytes
        wanted += len(worker.experts) * sizes.expert_bytes + shard.has_ends * sizes.end_bytes
        read = factory.bytes_read[worker.worker.worker_id]
        assert abs(read - wanted) <= 0.02 * wanted
    return cluster


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_any_spread_gives_the_tokens_of_one_process(
    golden_dir: Path, spread: Spread, dtype: str
) -> None:
    model_dir = golden_dir / "tiny"
    settings = ClusterSettings(cache_size=CACHE, seed=spread.num_workers)
    cluster = make_cluster(model_dir, spread, settings, dtype)
    expected = alone(model_dir, 8, dtype=dtype)
    assert served(cluster, requests(8), at_a_time=4) == expected


def test_a_long_chain_gives_the_tokens_of_one_process(golden_dir: Path) -> None:
    model_dir = golden_dir / "mini8"
    settings = ClusterSettings(cache_size=CACHE)
    cluster = make_cluster(model_dir, Spread(5, 1, AttentionCut.LAYERS), settings)
    assert len(cluster.view.chains.popitem()[1]) == 5
    assert served(cluster, requests(3), at_a_time=3) == alone(model_dir, 3)


@pytest.mark.parametrize("at_a_time", [1, 3, 16])
def test_neighbours_that_come_and_go_change_nothing(golden_dir: Path, at_a_time: int) -> None:
    model_dir = golden_dir / "tiny"
    settings = ClusterSettings(cache_size=CACHE, max_micro_batches=3)
    cluster = make_cluster(model_dir, Spread(3, 2, AttentionCut.REPLICATED), settings)
    assert served(cluster, requests(16), at_a_time) == alone(model_dir, 16)


@pytest.mark.parametrize("cut", [AttentionCut.REPLICATED, AttentionCut.LAYERS])
def test_preemption_changes_nothing(golden_dir: Path, cut: AttentionCut) -> None:
    model_dir = golden_dir / "tiny"
    small = dataclasses.replace(CACHE, num_blocks=12)
    scheduler = SchedulerLimits(max_running=8, max_step_tokens=7)
    settings = ClusterSettings(cache_size=small, scheduler=scheduler)
    cluster = make_cluster(model_dir, Spread(2, 1, cut), settings)
    assert served(cluster, requests(8), at_a_time=8) == alone(model_dir, 8)
