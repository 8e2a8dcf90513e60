"""However a model is spread, requests get the tokens and log-probabilities of one process.

All cells use three layers, which the planner can cut in every way that matters: programs are few,
and compiling them is most of the time. One goes through twelve.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pytest

from cluster.model_bytes import checkpoint_bytes
from cluster.placement import AttentionCut
from model.checkpoint import Checkpoint
from model.runner import CacheSize
from model.sampling_params import SamplingParams
from router.admission import RoutedRequest
from router.engine import LocalEngine
from router.request import GenerateRequest
from router.scheduler import SchedulerLimits
from router.sequence import NoText, TokenEvent
from tests.memory_cluster import ClusterSettings, Heard, MemoryCluster, all_ended
from tests.runners import load, runner_of
from tests.shards import ShardFactory, place, view_of

CACHE = CacheSize(num_blocks=64, block_size=4, max_slots=16)
# Of the smaller vocabulary of the two models.
VOCAB_SIZE = 256
Told = list[TokenEvent]


@dataclass(frozen=True, slots=True)
class Spread:
    """A way to spread a model."""

    num_workers: int
    replicas: int
    cut: AttentionCut

    def __str__(self) -> str:
        return f"{self.num_workers}w-{self.replicas}r-{self.cut.value}"


SPREADS = [
    Spread(num_workers, replicas, cut)
    for num_workers in (1, 2, 3, 5)
    for replicas in (1, 2)
    for cut in (AttentionCut.REPLICATED, AttentionCut.LAYERS)
    if replicas <= num_workers
]


def requests(count: int, seed: int = 0) -> list[GenerateRequest]:
    """Greedy and seeded, short and long, some with equal beginnings, some with two samples."""
    random = Random(seed)
    shared = tuple(random.randrange(3, VOCAB_SIZE) for _ in range(9))
    made: list[GenerateRequest] = []
    for i in range(count):
        own = tuple(random.randrange(3, VOCAB_SIZE) for _ in range(random.randint(1, 12)))
        sampling = SamplingParams(
            temperature=0.0 if i % 2 == 0 else 0.9,
            top_p=0.95 if i % 3 == 0 else 1.0,
            frequency_penalty=0.4 if i % 4 == 1 else 0.0,
            num_logprobs=3 if i % 3 == 1 else 0,
            seed=i,
        )
        made.append(
            GenerateRequest(
                prompt_ids=shared + own if i % 2 else own,
                max_tokens=random.randint(1, 10),
                sampling=sampling,
                num_samples=2 if i % 5 == 4 else 1,
                ignore_eos=True,
            )
        )
    return made


@cache
def alone(model_dir: Path, count: int, seed: int = 0) -> list[Told]:
    """What one process tells of each request, one after another."""
    engine = LocalEngine(runner_of(load(model_dir), cache_size=CACHE), tokenizer=None)
    return [by_sample(list(engine.generate(request))) for request in requests(count, seed)]


def by_sample(events: Told) -> Told:
    """Samples come interleaved as steps have it; within each, order is order."""
    return sorted(events, key=lambda event: event.sample_index)


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


def make_cluster(model_dir: Path, spread: Spread, settings: ClusterSettings) -> MemoryCluster:
    """A cluster in which every worker has read its own bytes of the checkpoint, and no others."""
    placement = place(model_dir, spread.num_workers, spread.replicas, spread.cut)
    view = view_of(placement)
    with Checkpoint.open(model_dir) as checkpoint:
        config, sizes = checkpoint.config, checkpoint_bytes(checkpoint, 4)
    factory = ShardFactory(model_dir, settings.cache_size)
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


@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_any_spread_gives_the_tokens_of_one_process(golden_dir: Path, spread: Spread) -> None:
    model_dir = golden_dir / "tiny"
    settings = ClusterSettings(cache_size=CACHE, seed=spread.num_workers)
    cluster = make_cluster(model_dir, spread, settings)
    assert served(cluster, requests(8), at_a_time=4) == alone(model_dir, 8)


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
