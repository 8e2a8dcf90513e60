"""The controller's actor takes settings or refuses them, without a Ray: its fleet is a fake."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from milliways.cluster.control.fleet import Existing
from milliways.cluster.ray import controller_actor
from milliways.cluster.ray.controller_actor import ControllerActor
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.runtime.async_tasks import AsyncTasks
from milliways.wire.errors import ChangeRefusedError, ConfigError
from milliways.wire.view import EMPTY_VIEW, Declared
from tests import fake_fleet
from tests.fake_fleet import FakeFleet

CONFIG = ClusterConfig()
TIMEOUT_S = 60.0


class FakeRayFleet(FakeFleet):
    """A fake fleet with what the actor asks of the real one."""

    existing: tuple[Existing, ...] = ()

    def __init__(self, config: ClusterConfig, shell: AsyncTasks) -> None:
        super().__init__(shell.tasks, memory_bytes=1 << 40)
        self.config = config
        self.model = None

    async def find_existing(self) -> list[Existing]:
        self.now = dict(WORKERS)
        return list(self.existing)


WORKERS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    WORKERS.clear()
    monkeypatch.setattr(FakeRayFleet, "existing", ())
    monkeypatch.setattr(controller_actor, "RayFleet", FakeRayFleet)
    monkeypatch.setattr(fake_fleet, "SPAWN_S", 0.01)
    monkeypatch.setattr(fake_fleet, "LOAD_S", 0.01)


async def started(config: ClusterConfig = CONFIG, at_s: float = 5.0) -> ControllerActor:
    actor = ControllerActor(config, at_s)
    await actor.begin()
    async with asyncio.timeout(TIMEOUT_S):
        while not (await actor.progress())["is_complete"]:
            await asyncio.sleep(0.01)
    return actor


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())


def test_settings_are_planned_then_applied() -> None:
    async def check() -> None:
        actor = await started()
        values = {"workers.count": 4, "ingress.max_body_bytes": 2048}
        assert await actor.plan(values) == (
            "workers.count: 3 -> 4 (live)",
            "ingress.max_body_bytes: 4194304 -> 2048 (live)",
        )
        declared = await actor.apply(values)
        status = await actor.settle(declared.at_s, TIMEOUT_S)
        assert (status.pending, status.problem) == ((), "")
        assert status.declared == flat(CONFIG) | values
        assert status.observed == {"workers.count": 4}
        assert (await actor.config()) == changed(CONFIG, values)
        # Workers share the memory of a machine as they did at first.
        assert actor._fleet.config.workers.count == 3
        actor._controller.close()

    run(check)


def test_later_declaration_of_an_ingress_counts_and_an_earlier_one_does_not() -> None:
    async def check() -> None:
        actor = await started(at_s=5.0)
        more = Declared(values=flat(changed(CONFIG, {"workers.count": 4})), at_s=4.0)
        assert (await actor.declare(more)).values["workers.count"] == 3
        later = replace(more, at_s=6.0)
        assert await actor.declare(later) == later
        status = await actor.settle(6.0, TIMEOUT_S)
        assert status.observed == {"workers.count": 4}
        actor._controller.close()

    run(check)


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"model.path": "/m"}, ChangeRefusedError, "needs a new generation: model.path"),
        ({"workers.memory_gb_each": 1e-6}, ChangeRefusedError, "worker-0 needs"),
        ({"workers.expert_replicas": 4}, ConfigError, "workers.expert_replicas = 4"),
    ],
)
def test_refused_settings_leave_everything_as_it_was(
    values: dict[str, Any], error: type[Exception], says: str
) -> None:
    async def check() -> None:
        actor = await started()
        before = await actor.settle(0.0, 0.0)
        for ask in (actor.plan, actor.apply):
            with pytest.raises(error, match=says):
                await ask(values)
        after = await actor.settle(0.0, 0.0)
        assert (after.declared, after.pending) == (before.declared, ())
        assert await actor.config() == CONFIG
        actor._controller.close()

    run(check)


def test_scale_and_drain_may_be_asked_again() -> None:
    async def check() -> None:
        actor = await started()
        for _ in range(2):
            await actor.scale(4)
        incarnation = await actor.incarnation_of("worker-1")
        for _ in range(2):
            await actor.finish_drain("worker-1", True, incarnation)
        assert await actor.incarnation_of("worker-1") == incarnation + 1
        incarnation = await actor.incarnation_of("worker-3")
        for _ in range(2):
            await actor.finish_drain("worker-3", False, incarnation)
        status = await actor.settle(0.0, TIMEOUT_S)
        assert status.declared["workers.count"] == 3 and status.pending == ()
        actor._controller.close()

    run(check)


def test_next_controller_keeps_the_model_of_the_workers_that_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check() -> None:
        first = await started()
        await first.apply({"workers.count": 4})
        await first.settle(0.0, TIMEOUT_S)
        await asyncio.sleep(0.1)
        fleet, controller = first._fleet, first._controller
        WORKERS.update(fleet.now)
        found = [
            Existing(
                worker_id=record.worker_id,
                incarnation=record.incarnation,
                spawned=record.spawned,
                shards=record.shards,
                held=record.held,
                view=fleet.now[record.worker_id].views[-1],
                settings=record.started_with,
            )
            for record in controller.workers.values()
        ]
        monkeypatch.setattr(FakeRayFleet, "existing", tuple(found))
        # An ingress of another model starts it, and knows nothing of the others.
        other = changed(CONFIG, {"model.name": "other"})
        second = await started(other, at_s=controller.declared.at_s + 1.0)
        assert await second.config() == changed(CONFIG, {"workers.count": 4})
        status = await second.settle(0.0, TIMEOUT_S)
        assert "needs a new generation: model.name: '' -> 'other'" in status.problem
        with pytest.raises(ChangeRefusedError):
            await second.declare(Declared(values=flat(other), at_s=controller.declared.at_s + 1.0))
        assert (await second.view(0, 1.0)).declared.values["model.name"] == ""
        for actor in (first, second):
            actor._controller.close()

    assert EMPTY_VIEW.declared == Declared()
    run(check)
