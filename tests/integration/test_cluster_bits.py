"""However a model is spread, requests get the tokens and log-probabilities of one process.

All cells use three layers, which the planner can cut in every way that matters: programs are few,
and compiling them is most of the time. One goes through twelve.
"""

import dataclasses
from pathlib import Path

import pytest

from milliways.cluster.control.planner import AttentionCut
from milliways.cluster.host.model_bytes import checkpoint_bytes
from milliways.model.checkpoint import Checkpoint
from milliways.model.sampling_params import SamplingParams
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import NoText
from milliways.wire.view import Member
from milliways.workers.core import WorkerCore
from milliways.workers.kv_arrays import KvArrays
from tests.memory_cluster import ClusterSettings, MemoryCluster, Process
from tests.recording import Recording, all_ended, num_running
from tests.runners import ON_GPU
from tests.shards import ShardFactory, place, view_of
from tests.spreads import (
    CACHE,
    DTYPES,
    SPREADS,
    Spread,
    Tokens,
    alone,
    answers,
    by_sample,
    requests,
)


def served(cluster: MemoryCluster, wanted: list[GenerationRequest], at_a_time: int) -> list[Tokens]:
    """The cluster's tokens for each request; requests join while others run."""
    routers = sorted(cluster.routers)
    recordings: dict[str, Recording] = {}
    for i, request in enumerate(wanted):
        routed = RoutedRequest(request_id=str(i), request=request, timeout_s=1e6)
        recordings[str(i)] = cluster.submit(routers[i % len(routers)], str(i), routed)
        cluster.run_until(lambda: num_running(recordings) < at_a_time, 1e6)
    cluster.run_until(lambda: all_ended(recordings), 1e6)
    assert [recording.error for recording in recordings.values()] == [None] * len(wanted)
    cluster.settle()
    cluster.close()
    return [by_sample(recording.events) for recording in recordings.values()]


def make_cluster(
    model_dir: Path,
    spread: Spread,
    settings: ClusterSettings,
    dtype: str = "float32",
    num_devices: int = 1,
) -> MemoryCluster:
    """A cluster in which every worker has read its own bytes of the checkpoint, and no others."""
    placement = place(model_dir, spread.num_workers, spread.replicas, spread.cut)
    view = view_of(placement)
    with Checkpoint.open(model_dir) as checkpoint:
        config, sizes = checkpoint.config, checkpoint_bytes(checkpoint, 4)
    factory = ShardFactory(model_dir, settings.cache_size, dtype, num_devices=num_devices)

    def make_core(member: Member, process: Process) -> WorkerCore:
        core = factory(member, process.tasks)
        process.arrays = factory.arrays[member.worker_id]
        return core

    cluster = MemoryCluster(
        config,
        settings,
        make_core,
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


@pytest.mark.skipif(ON_GPU, reason="takes eight devices")
@pytest.mark.parametrize("num_devices", [2, 3, 8])
@pytest.mark.parametrize(
    "spread",
    [Spread(1, 1, AttentionCut.REPLICATED), Spread(2, 1, AttentionCut.LAYERS)],
    ids=str,
)
def test_any_number_of_devices_gives_the_tokens_of_one(
    golden_dir: Path, spread: Spread, num_devices: int
) -> None:
    model_dir = golden_dir / "tiny"
    settings = ClusterSettings(cache_size=CACHE, seed=num_devices)
    cluster = make_cluster(model_dir, spread, settings, num_devices=num_devices)
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


# With a token that is never visible as a key.
COPIED = GenerationRequest(
    prompt_ids=(5, 9, 0, 17, 4, 0, 8, 30, 31, 32, 33, 34, 35),
    max_tokens=12,
    sampling=SamplingParams(temperature=0.0),
    ignore_eos=True,
)


def run_at(cluster: MemoryCluster, name: str, routed: RoutedRequest) -> Tokens:
    recording = cluster.submit(name, routed.request_id, routed)
    cluster.run_until(lambda: recording.has_ended, 1e6)
    cluster.settle()
    assert recording.error is None
    return by_sample(recording.events)


def blocks_of(cluster: MemoryCluster, name: str, token_ids: list[int]) -> list[bytes]:
    """Keys, values and visibility of the blocks that a router has of a sequence."""
    (process,) = [p for p in cluster.processes if p.name == name]
    arrays, pool = process.arrays, cluster.routers[name].scheduler.pool
    assert isinstance(arrays, KvArrays)
    block_ids = pool.match_prefix(token_ids)
    pool.free(block_ids)
    keys_CLPRK, values_CLPRK = arrays.read_blocks(block_ids)
    return [
        keys.tobytes() + values.tobytes() + arrays.visible(block_id).tobytes()
        for block_id, keys, values in zip(block_ids, keys_CLPRK, values_CLPRK, strict=True)
    ]


@pytest.mark.parametrize("num_devices", [1] if ON_GPU else [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_the_bits_that_their_standby_would_compute(
    golden_dir: Path, dtype: str, num_devices: int
) -> None:
    model_dir = golden_dir / "tiny"
    settings = ClusterSettings(cache_size=CACHE, kv_standby=True)
    spread = Spread(3, 2, AttentionCut.REPLICATED)
    cluster = make_cluster(model_dir, spread, settings, dtype, num_devices)
    routed = RoutedRequest(request_id="whole", request=COPIED, timeout_s=1e6)
    (told,) = answers(model_dir, [COPIED], dtype)
    assert run_at(cluster, "w0", routed) == told
    token_ids = [*COPIED.prompt_ids, *(event.token_id for event in told)]
    standby = cluster.routers["w0"].standby_id
    (third,) = {"w0", "w1", "w2"} - {"w0", standby}
    assert run_at(cluster, third, routed) == told
    copied = blocks_of(cluster, standby, token_ids)
    # The last block became full with the last token, when nobody had use for it any more.
    assert len(copied) == (len(token_ids) - 2) // CACHE.block_size == 5
    assert copied == blocks_of(cluster, third, token_ids)[:5]
    # The standby goes on with them as if it had computed them.
    num_positions = cluster.routers[standby].figures.num_positions
    half = tuple(event.token_id for event in told[:6])
    carried_on = dataclasses.replace(routed, request_id="rest", delivered={0: half})
    assert run_at(cluster, standby, carried_on) == told[6:]
    num_positions = cluster.routers[standby].figures.num_positions - num_positions
    assert num_positions <= CACHE.block_size + len(told) - len(half)
    cluster.close()
