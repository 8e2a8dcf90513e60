"""A new controller looks for the workers of an earlier one: which it keeps, and which it ends."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from milliways.cluster.control.fleet import Existing, Spawned
from milliways.cluster.ray import fleet as ray_fleet
from milliways.cluster.ray.fleet import RayFleet
from milliways.cluster.ray.start_worker import NAMESPACE
from milliways.cluster.settings.config import ClusterConfig
from milliways.model.small_files import SmallFiles
from milliways.runtime.async_tasks import AsyncTasks
from milliways.wire.errors import UnavailableError
from milliways.wire.placement import ModelBytes, ShardPlan
from milliways.wire.view import EMPTY_VIEW

NAME = "g1-worker-3-2"
MODEL = ModelBytes(
    num_layers=1,
    num_experts=1,
    expert_bytes=1,
    attention_layer_bytes=1,
    end_bytes=1,
    kv_layer_bytes_per_token=1,
)
EXISTING = Existing(
    worker_id="worker-3",
    incarnation=2,
    spawned=Spawned(address="", router_address="", node_id="", pid=1, memory_bytes=1),
    shards=ShardPlan(first_layer=0, num_layers=1, has_ends=True, experts=frozenset()),
    held=frozenset(),
    view=EMPTY_VIEW,
)
Describe = Callable[[], Awaitable[Existing | None]]


class FakeRay:
    """One actor of an earlier controller."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, describe: Describe) -> None:
        self.killed: list[Any] = []
        self.actor = SimpleNamespace(
            describe=SimpleNamespace(remote=describe),
            until_gone=SimpleNamespace(remote=lambda: asyncio.Event().wait()),
        )
        entries = [{"name": NAME, "namespace": NAMESPACE}, {"name": "other", "namespace": "x"}]
        monkeypatch.setattr(ray_fleet, "list_named_actors", lambda all_namespaces: entries)
        monkeypatch.setattr("ray.get_actor", lambda name, namespace: self.actor)
        monkeypatch.setattr("ray.kill", self.killed.append)
        monkeypatch.setattr(ray_fleet, "DESCRIBE_TIMEOUT_S", 0.01)
        monkeypatch.setattr(ray_fleet, "DESCRIBE_AGAIN_AFTER_S", 0.0)

    def find(self) -> list[Existing]:
        async def find() -> list[Existing]:
            return await RayFleet(ClusterConfig(), AsyncTasks()).find_existing()

        return asyncio.run(find())


def error_in_worker() -> Exception:
    """As Ray hands on a TimeoutError that a worker raised: an instance of both."""
    failed = RayTaskError("describe", "its traceback", TimeoutError("router: no answer"))
    error = failed.as_instanceof_cause()
    assert isinstance(error, TimeoutError)
    return error


def test_a_worker_that_answers_with_errors_is_asked_again_and_never_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_asked = 0

    async def describe() -> Existing:
        nonlocal num_asked
        num_asked += 1
        raise error_in_worker()

    fake = FakeRay(monkeypatch, describe)
    with pytest.raises(UnavailableError, match="g1-worker-3-2 does not say what it holds"):
        fake.find()
    assert num_asked == 3 and fake.killed == []


def test_a_worker_that_answers_after_an_error_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [error_in_worker()]

    async def describe() -> Existing:
        if errors:
            raise errors.pop()
        return EXISTING

    fake = FakeRay(monkeypatch, describe)
    assert fake.find() == [EXISTING]
    assert fake.killed == []


async def silent() -> Existing | None:
    await asyncio.sleep(10.0)


async def gone() -> Existing | None:
    raise RayActorError


async def without_shards() -> Existing | None:
    return None


@pytest.mark.parametrize("describe", [silent, gone, without_shards])
def test_a_worker_that_is_silent_or_has_loaded_nothing_is_ended(
    monkeypatch: pytest.MonkeyPatch, describe: Describe
) -> None:
    fake = FakeRay(monkeypatch, describe)
    assert fake.find() == []
    assert fake.killed == [fake.actor]


def test_an_incarnation_that_counts_as_dead_is_ended_before_the_next_one_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be alive: one that could not load its shards still has its GPUs."""
    fake = FakeRay(monkeypatch, silent)

    async def start(small_files: SmallFiles | None) -> Spawned:
        return EXISTING.spawned

    first, second = (
        SimpleNamespace(
            start=SimpleNamespace(remote=start),
            until_gone=SimpleNamespace(remote=lambda: asyncio.Event().wait()),
        )
        for _ in range(2)
    )
    actors = iter((first, second))
    monkeypatch.setattr(ray_fleet, "group_of", lambda settings, generation, worker_id: "a group")
    monkeypatch.setattr(ray_fleet, "start_worker", lambda *arguments: next(actors))

    async def spawn_twice() -> None:
        shell = AsyncTasks()
        fleet = RayFleet(ClusterConfig(), shell)
        fleet.sizes = MODEL
        await shell.wait(fleet.spawn("worker-3", 1, None))
        assert fake.killed == []
        await shell.wait(fleet.spawn("worker-3", 2, None))

    asyncio.run(spawn_twice())
    assert fake.killed == [first]
