"""However a model is spread, requests get the tokens and log-probabilities of one process."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from cluster.model_bytes import checkpoint_bytes
from cluster.placement import AttentionCut
from model.checkpoint import Checkpoint
from model.runner import CacheSize
from model.sampling import SamplingParams
from router.admission import RoutedRequest
from router.engine import LocalEngine
from router.request import GenerateRequest
from router.scheduler import SchedulerLimits
from router.sequence import NoText, TokenEvent
from tests.memory_cluster import ClusterSettings, Heard, MemoryCluster, all_ended
from tests.runners import load, runner_of
from tests.shards import ShardFactory, place, view_of

CACHE = CacheSize(num_blocks=64, block_size=4, max_slots=16)
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


def requests(count: int, vocab_size: int, seed: int = 0) -> list[GenerateRequest]:
    """Greedy and seeded, short and long, some with equal beginnings, some with two samples."""
    random = Random(seed)
    shared = tuple(random.randrange(3, vocab_size) for _ in range(9))
    made: list[GenerateRequest] = []
    for i in range(count):
        own = tuple(random.randrange(3, vocab_size) for _ in range(random.randint(1, 12)))
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


def alone(model_dir: Path, wanted: list[GenerateRequest]) -> list[Told]:
    """What one process tells of each request, one after another."""
    engine = LocalEngine(runner_of(load(model_dir), cache_size=CACHE), tokenizer=None)
    return [by_sample(list(engine.generate(request))) for request in wanted]


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
    placement = place(model_dir, spread.num_workers, spread.replicas, spread.cut)
    view = view_of(placement)
    with Checkpoint.open(model_dir) as checkpoint:
        config = checkpoint.config
    factory = ShardFactory(model_dir, settings.cache_size)
    return MemoryCluster(config, settings, factory, view, lambda request: NoText())


@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_any_spread_gives_the_tokens_of_one_process(golden_dir: Path, spread: Spread) -> None:
    model_dir = golden_dir / "mini8"
    wanted = requests(8, 256)
    settings = ClusterSettings(cache_size=CACHE, seed=spread.num_workers)
    cluster = make_cluster(model_dir, spread, settings)
    assert served(cluster, wanted, at_a_time=4) == alone(model_dir, wanted)


@pytest.mark.parametrize("at_a_time", [1, 3, 16])
def test_neighbours_that_come_and_go_change_nothing(golden_dir: Path, at_a_time: int) -> None:
    model_dir = golden_dir / "mini8"
    wanted = requests(16, 256, seed=at_a_time)
    settings = ClusterSettings(cache_size=CACHE, max_micro_batches=3)
    cluster = make_cluster(model_dir, Spread(3, 2, AttentionCut.REPLICATED), settings)
    assert served(cluster, wanted, at_a_time) == alone(model_dir, wanted)


@pytest.mark.parametrize("cut", [AttentionCut.REPLICATED, AttentionCut.LAYERS])
def test_preemption_changes_nothing(golden_dir: Path, cut: AttentionCut) -> None:
    model_dir = golden_dir / "mini8"
    wanted = requests(8, 256, seed=5)
    small = dataclasses.replace(CACHE, num_blocks=12)
    scheduler = SchedulerLimits(max_running=8, max_step_tokens=7)
    settings = ClusterSettings(cache_size=small, scheduler=scheduler)
    cluster = make_cluster(model_dir, Spread(2, 1, cut), settings)
    assert served(cluster, wanted, at_a_time=8) == alone(model_dir, wanted)


@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_a_worker_reads_its_own_bytes_only(golden_dir: Path, spread: Spread) -> None:
    model_dir = golden_dir / "mini8"
    placement = place(model_dir, spread.num_workers, spread.replicas, spread.cut)
    settings = ClusterSettings(cache_size=CACHE)
    factory = ShardFactory(model_dir, settings.cache_size)
    with Checkpoint.open(model_dir) as checkpoint:
        config = checkpoint.config
        sizes = checkpoint_bytes(checkpoint, 4)
    view = view_of(placement)
    MemoryCluster(config, settings, factory, view, lambda request: NoText()).close()
    for worker in placement.workers:
        shard = worker.attention
        wanted = shard.num_layers * sizes.attention_layer_bytes
        wanted += len(worker.experts) * sizes.expert_bytes + shard.has_ends * sizes.end_bytes
        read = factory.bytes_read[worker.worker.worker_id]
        assert abs(read - wanted) <= 0.02 * wanted
