"""The controller's actor without a Ray: its fleets are fakes, one for each generation."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from milliways.cluster.control.fleet import Existing
from milliways.cluster.control.room import NodeRoom
from milliways.cluster.ray import generation as running_generation
from milliways.cluster.ray import generation_set
from milliways.cluster.ray.controller_actor import ControllerActor
from milliways.cluster.ray.generation import RunningGeneration
from milliways.cluster.settings.config import ClusterConfig
from milliways.runtime.async_tasks import AsyncTasks
from tests import fake_fleet
from tests.fake_fleet import FakeFleet, FakeWorker

TIMEOUT_S = 60.0
PLENTY = {"CPU": 64.0, "memory": float(1 << 40)}


@dataclass
class FakeRay:
    """What outlives a controller: the workers of each generation; and which have ended."""

    workers: dict[int, dict[str, FakeWorker]] = field(default_factory=dict)
    existing: dict[int, list[Existing]] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    fleets: dict[int, "FakeRayFleet"] = field(default_factory=dict)
    # Workers of generations that start from now on, by their ids.
    unreadable: set[str] = field(default_factory=set)
    without_node: set[str] = field(default_factory=set)
    free: dict[str, float] = field(default_factory=lambda: dict(PLENTY))

    def leave(self, generation: RunningGeneration) -> None:
        """The controller dies: its workers stay, for the next one to find."""
        workers = self.fleets[generation.number].now
        self.workers[generation.number] = workers
        self.existing[generation.number] = [
            Existing(
                worker_id=record.worker_id,
                incarnation=record.incarnation,
                spawned=record.spawned,
                shards=record.shards,
                held=record.held,
                view=workers[record.worker_id].views[-1],
                settings=record.started_with,
            )
            for record in generation.controller.workers.values()
            if record.spawned is not None and record.shards is not None and record.held
        ]
        generation.controller.close()
        generation.shell.close()

    def die(self, actor: ControllerActor) -> None:
        """The controller dies."""
        assert actor._looking is not None
        actor._looking.cancel()
        for generation in actor._all.running.values():
            self.leave(generation)


class FakeRayFleet(FakeFleet):
    """A fake fleet with what the actor asks of the real one."""

    ray = FakeRay()

    def __init__(self, config: ClusterConfig, shell: AsyncTasks, generation: int = 1) -> None:
        super().__init__(shell.tasks, memory_bytes=1 << 40)
        self.generation = generation
        self.config = config
        self.model = None
        self.ray.fleets[generation] = self
        if generation > 1:
            self.unreadable |= self.ray.unreadable
            self.without_node |= self.ray.without_node

    async def find_existing(self) -> list[Existing]:
        self.now = dict(self.ray.workers.get(self.generation, {}))
        return self.ray.existing.get(self.generation, [])

    def stop_all(self) -> None:
        self.ray.ended.append(self.generation)

    async def progress(self, worker_id: str) -> tuple[int, int]:
        return 0, 0

    async def status(self, worker_id: str) -> Any:
        return None


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A Ray without any workers at first."""
    ray = FakeRay()

    def nodes_with_room(used_bytes: Any) -> list[NodeRoom]:
        used = sum(used_bytes.values())
        return [NodeRoom("node", ray.free, round(ray.free["memory"]), used)]

    monkeypatch.setattr(FakeRayFleet, "ray", ray)
    monkeypatch.setattr(running_generation, "RayFleet", FakeRayFleet)
    monkeypatch.setattr(running_generation, "nodes_with_room", nodes_with_room)
    monkeypatch.setattr(generation_set, "generations_that_run", lambda: sorted(ray.existing))
    monkeypatch.setattr(generation_set, "remove_groups", lambda unwanted: None)
    monkeypatch.setattr(fake_fleet, "SPAWN_S", 0.01)
    monkeypatch.setattr(fake_fleet, "LOAD_S", 0.01)
    return ray


async def started(config: ClusterConfig, at_s: float = 5.0) -> ControllerActor:
    """An actor whose cluster is complete."""
    actor = ControllerActor(config, at_s)
    await actor.begin()
    async with asyncio.timeout(TIMEOUT_S):
        while not (await actor.progress())["is_complete"]:
            await asyncio.sleep(0.01)
    return actor


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Runs a test in a loop of its own."""

    async def within_time() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(within_time())
