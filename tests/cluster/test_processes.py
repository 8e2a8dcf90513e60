"""Worker processes under the controller: same tokens for any spread, transport and death."""

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from milliways.cluster.control.planner import AttentionCut, PlacementPolicy
from milliways.cluster.control.targets import ControllerSettings
from milliways.cluster.host.model_bytes import checkpoint_bytes
from milliways.cluster.settings.config import (
    ClusterConfig,
    ModelSettings,
    RouterSettings,
    WorkerSettings,
)
from milliways.model.checkpoint import Checkpoint
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent
from milliways.wire.placement import ExpertId, ModelBytes
from milliways.wire.view import WorkerState
from tests.process_fleet import HostPool, ProcessCluster, process_cluster
from tests.served_cluster import short_folder
from tests.spreads import CACHE, SPREADS, Spread, Tokens, answers, by_sample, requests

LONG = 24
IDLE_TIMEOUT_S = 20.0
KV_TOKENS = CACHE.num_blocks * CACHE.block_size


@dataclass(frozen=True, slots=True)
class Model:
    """A model, requests for it, and what one process answers."""

    path: Path
    sizes: ModelBytes
    wanted: list[GenerationRequest]
    expected: list[Tokens]
    # The same, long enough for a worker to die meanwhile.
    wanted_long: list[GenerationRequest]
    expected_long: list[Tokens]


@pytest.fixture(scope="module")
def hosts() -> Iterator[HostPool]:
    with short_folder() as folder:
        pool = HostPool(folder)
        try:
            yield pool
        finally:
            pool.close()


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Model:
    path = golden_dir / "tiny"
    with Checkpoint.open(path) as checkpoint:
        sizes = checkpoint_bytes(checkpoint, 4)
    wanted = requests(8)
    wanted_long = [
        replace(request, max_tokens=LONG, num_samples=1, ignore_eos=True) for request in wanted
    ]
    expected = answers(path, wanted + wanted_long)
    num_short = len(wanted)
    return Model(path, sizes, wanted, expected[:num_short], wanted_long, expected[num_short:])


def config_of(
    model: Model, spread: Spread, transport: str, *, kv_standby: bool = False
) -> ClusterConfig:
    return ClusterConfig(
        model=ModelSettings(path=str(model.path)),
        workers=WorkerSettings(
            count=spread.num_workers,
            expert_replicas=spread.replicas,
            attention=spread.cut.value,
            transport=transport,
            threads_each=1,
            kv_tokens=KV_TOKENS,
            block_size=CACHE.block_size,
            kv_standby=kv_standby,
        ),
        router=RouterSettings(max_running=CACHE.max_slots, min_micro_batch_tokens=1),
    )


def settings_of(spread: Spread) -> ControllerSettings:
    return ControllerSettings(
        num_workers=spread.num_workers,
        expert_replicas=spread.replicas,
        policy=PlacementPolicy(attention=spread.cut, kv_tokens=KV_TOKENS),
    )


async def served(
    cluster: ProcessCluster,
    wanted: list[GenerationRequest],
    at_a_time: int,
    after: Callable[[int], None] = lambda num_tokens: None,
) -> list[Tokens]:
    """The tokens that clients receive; calls `after` with their total at each token."""
    room = asyncio.Semaphore(at_a_time)
    received: list[Tokens] = [[] for _ in wanted]

    async def one(index: int, request: GenerationRequest) -> None:
        def take(event: TokenEvent) -> None:
            received[index].append(event)
            after(sum(map(len, received)))

        async with room:
            await cluster.generate(request, f"request-{index}", take)

    await asyncio.gather(*(one(i, request) for i, request in enumerate(wanted)))
    return [by_sample(tokens) for tokens in received]


async def check_idle(cluster: ProcessCluster) -> None:
    """Asserts that no resource is held after all requests ended.

    On a busy machine a request may have been hedged; the second router learns late that it lost.
    """
    names = ("kv_blocks_used", "active_requests", "running", "waiting")
    until_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        statuses = await cluster.status()
        held = {w: [getattr(s.router, name) for name in names] for w, s in statuses.items()}
        if all(counts == [0] * len(names) for counts in held.values()):
            return
        assert time.monotonic() < until_s, held
        await asyncio.sleep(0.05)


def check_replicas(cluster: ProcessCluster, model: Model, spread: Spread) -> None:
    """Every expert has at least the wanted number of holders."""
    view = cluster.controller.view
    for layer in range(model.sizes.num_layers):
        for expert in range(model.sizes.num_experts):
            assert len(view.holders(ExpertId(layer, expert))) >= spread.replicas


# A single worker sends nothing to others, so one transport is enough for it.
CASES = [
    (spread, transport)
    for spread in SPREADS
    for transport in ("shm", "grpc")
    if spread.num_workers > 1 or transport == "shm"
]


@pytest.mark.parametrize(("spread", "transport"), CASES, ids=str)
def test_any_spread_over_processes(
    hosts: HostPool, model: Model, spread: Spread, transport: str
) -> None:
    async def main() -> None:
        config = config_of(model, spread, transport)
        async with process_cluster(hosts, config, settings_of(spread), model.sizes) as cluster:
            check_replicas(cluster, model, spread)
            assert await served(cluster, model.wanted, at_a_time=4) == model.expected
            await check_idle(cluster)
            for worker_id, status in (await cluster.status()).items():
                assert abs(status.bytes_read - bytes_of(cluster, model, worker_id)) <= (
                    0.02 * status.bytes_read
                )
                used = status.router.transports.items()
                assert {name for other, name in used if other != worker_id} <= {f"{transport}+ring"}

    asyncio.run(main())


def bytes_of(cluster: ProcessCluster, model: Model, worker_id: str) -> int:
    """Bytes of a worker's shards in the checkpoint."""
    shards, sizes = cluster.controller.workers[worker_id].shards, model.sizes
    assert shards is not None
    attention_bytes = shards.num_layers * sizes.attention_layer_bytes
    ends_bytes = shards.has_ends * sizes.end_bytes
    return attention_bytes + ends_bytes + len(shards.experts) * sizes.expert_bytes


DEATHS = [
    (Spread(3, 2, AttentionCut.REPLICATED), "shm", "worker-1"),
    (Spread(2, 1, AttentionCut.REPLICATED), "grpc", "worker-0"),
    (Spread(3, 2, AttentionCut.LAYERS), "grpc", "worker-1"),
    (Spread(3, 1, AttentionCut.LAYERS), "shm", "worker-0"),
]


@pytest.mark.parametrize(("spread", "transport", "victim"), DEATHS, ids=str)
def test_death_in_the_middle_costs_no_token(
    hosts: HostPool, model: Model, spread: Spread, transport: str, victim: str
) -> None:
    async def main() -> None:
        config = config_of(model, spread, transport)
        async with process_cluster(hosts, config, settings_of(spread), model.sizes) as cluster:
            await survive(cluster, model, spread, victim)

    asyncio.run(main())


def copy_of(model: Model, folder: Path) -> Model:
    return replace(model, path=Path(shutil.copytree(model.path, folder / "model")))


def test_a_worker_whose_files_are_gone_gets_its_parts_from_others(
    hosts: HostPool, model: Model, tmp_path: Path
) -> None:
    spread, copy = Spread(3, 2, AttentionCut.REPLICATED), copy_of(model, tmp_path)

    async def main() -> None:
        config = config_of(copy, spread, "shm")
        async with process_cluster(hosts, config, settings_of(spread), copy.sizes) as cluster:
            shutil.rmtree(copy.path)
            await survive(cluster, copy, spread, "worker-1")
            record = cluster.controller.workers["worker-1"]
            assert "took parts from other workers" in record.last_error
            # Configuration and tokenizer, and then every tensor.
            assert f"{copy.path}: no such model directory, and " in record.last_error

    asyncio.run(main())


def test_a_worker_that_read_other_bytes_waits_for_the_right_ones(
    hosts: HostPool, model: Model, tmp_path: Path
) -> None:
    """Nobody else holds its experts, so that it needs its files."""
    spread, copy = Spread(2, 1, AttentionCut.REPLICATED), copy_of(model, tmp_path)

    async def main() -> None:
        config = config_of(copy, spread, "shm")
        async with process_cluster(hosts, config, settings_of(spread), copy.sizes) as cluster:
            kept = {path: path.read_bytes() for path in (copy.path / "ckpt-0").iterdir()}
            for path, content in kept.items():
                # The last byte is in the last expert's scales, or in a plain array.
                path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
            cluster.fleet.kill("worker-1")
            workers = cluster.controller.workers
            await cluster.until(
                lambda: any("is not that of the model" in r.last_error for r in workers.values()),
                "somebody has refused a file",
            )
            assert not cluster.controller.is_complete
            for path, content in kept.items():
                path.write_bytes(content)
            await cluster.until_ready()
            assert await served(cluster, copy.wanted, at_a_time=4) == copy.expected

    asyncio.run(main())


@pytest.mark.parametrize("victim", ["worker-0", "worker-1"])
def test_a_worker_for_experts_only_serves_and_dies_like_any_other(
    hosts: HostPool, model: Model, victim: str
) -> None:
    spread = Spread(3, 2, AttentionCut.REPLICATED)

    async def main() -> None:
        config = config_of(model, spread, "grpc")
        settings = replace(settings_of(spread), experts_only=1)
        async with process_cluster(hosts, config, settings, model.sizes) as cluster:
            await survive(cluster, model, spread, victim)
            status = await cluster.status()
            assert [status[f"worker-{n}"].layers[1] > 0 for n in range(3)] == [False, True, True]
            assert status["worker-0"].calls > 0

    asyncio.run(main())


async def survive(cluster: ProcessCluster, model: Model, spread: Spread, victim: str) -> None:
    """A worker dies under load and restarts; no client notices."""
    killed: list[int] = []

    def after(num_tokens: int) -> None:
        if num_tokens == len(model.wanted_long) * LONG // 3:
            killed.append(num_tokens)
            cluster.fleet.kill(victim)

    assert await served(cluster, model.wanted_long, 8, after) == model.expected_long
    assert killed
    workers = cluster.controller.workers
    await cluster.until(
        lambda: workers[victim].incarnation == 2 and workers[victim].state is WorkerState.READY,
        "the worker is back",
    )
    await cluster.until_ready()
    assert cluster.controller.figures.num_deaths == 1
    check_replicas(cluster, model, spread)
    # The restarted worker serves, too.
    assert await served(cluster, model.wanted, at_a_time=4) == model.expected
    await check_idle(cluster)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_standby_of_a_dead_router_computes_only_what_was_not_copied(
    hosts: HostPool, model: Model, transport: str
) -> None:
    spread = Spread(3, 2, AttentionCut.REPLICATED)
    # The longest prompt. The first router gets it: all are idle, and chance is seeded.
    index = max(range(len(model.wanted)), key=lambda i: len(model.wanted_long[i].prompt_ids))
    wanted, expected = model.wanted_long[index], model.expected_long[index]
    killed_at = LONG - 4

    async def main() -> None:
        config = config_of(model, spread, transport, kv_standby=True)
        async with process_cluster(hosts, config, settings_of(spread), model.sizes) as cluster:
            before = await cluster.status()
            victim = "worker-0"
            standby = before[victim].router.standby
            assert standby and standby != victim

            def after(num_tokens: int) -> None:
                if num_tokens == killed_at:
                    cluster.fleet.kill(victim)

            assert await served(cluster, [wanted], 1, after) == [expected]
            assert cluster.controller.figures.num_deaths == 1
            router = (await cluster.shell.wait(cluster.fleet.status(standby))).router
            num_positions = router.positions - before[standby].router.positions
            # The kill may come some tokens late, and the last copies may not have arrived.
            assert num_positions <= LONG - killed_at + 3 * CACHE.block_size
            num_blocks = (len(wanted.prompt_ids) + killed_at) // CACHE.block_size
            assert router.standby_blocks_kept >= num_blocks - 3
            await cluster.until_ready()
            # The restarted router has a standby again, and is the standby of another.
            assert await served(cluster, model.wanted, at_a_time=4) == model.expected
            standbys = {w: s.router.standby for w, s in (await cluster.status()).items()}
            assert all(standbys.values()) and victim in standbys.values()
            await check_idle(cluster)

    asyncio.run(main())


def test_workers_with_several_devices_take_over_for_each_other(model: Model) -> None:
    spread, num_devices = Spread(2, 1, AttentionCut.REPLICATED), 3

    async def main(hosts: HostPool) -> None:
        config = config_of(model, spread, "shm", kv_standby=True)
        # Every size is compiled for every device before a worker is ready.
        router = replace(config.router, max_step_tokens=8)
        config = replace(config, router=router)
        async with process_cluster(hosts, config, settings_of(spread), model.sizes) as cluster:
            await survive(cluster, model, spread, "worker-0")
            for status in (await cluster.status()).values():
                devices = status.devices
                assert [device.device for device in devices] == ["cpu:0", "cpu:1", "cpu:2"]
                assert [device.has_ends for device in devices] == [True, False, False]
                counts = [device.num_experts for device in devices]
                assert min(counts) > 0 and sum(counts) == status.num_experts
                assert sum(device.layers[1] for device in devices) == model.sizes.num_layers

    with short_folder() as folder:
        pool = HostPool(folder, num_devices)
        try:
            asyncio.run(main(pool))
        finally:
            pool.close()
