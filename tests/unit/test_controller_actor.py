"""The controller's actor takes settings or refuses them, without a Ray: its fleet is a fake."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from milliways.cluster.ray.controller_actor import ControllerActor
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.model.demo import DEMO_DIR
from milliways.model.small_files import SmallFiles
from milliways.wire.errors import ChangeRefusedError, ConfigError
from milliways.wire.view import EMPTY_VIEW, Declared
from tests.fake_ray import TIMEOUT_S, FakeRay, ray, run, started

__all__ = ["ray"]

CONFIG = ClusterConfig()


@pytest.fixture(autouse=True)
def no_workers(ray: FakeRay) -> FakeRay:
    return ray


def test_settings_are_planned_then_applied() -> None:
    async def check() -> None:
        actor = await started(CONFIG)
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
        assert actor._all.serving.fleet.config.workers.count == 3
        await actor.stop()

    run(check)


def test_later_declaration_of_an_ingress_counts_and_an_earlier_one_does_not() -> None:
    async def check() -> None:
        actor = await started(CONFIG, at_s=5.0)
        more = Declared(values=flat(changed(CONFIG, {"workers.count": 4})), at_s=4.0)
        assert (await actor.declare(more)).values["workers.count"] == 3
        later = replace(more, at_s=6.0)
        assert await actor.declare(later) == later
        status = await actor.settle(6.0, TIMEOUT_S)
        assert status.observed == {"workers.count": 4}
        await actor.stop()

    run(check)


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        (
            {"model.path": "/m"},
            ChangeRefusedError,
            "needs a new generation: model.path",
        ),
        ({"workers.memory_gb_each": 1e-6}, ChangeRefusedError, "worker-0 needs"),
        ({"workers.expert_replicas": 4}, ConfigError, "workers.expert_replicas = 4"),
    ],
)
def test_refused_settings_leave_everything_as_it_was(
    values: dict[str, Any], error: type[Exception], says: str
) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        before = await actor.settle(0.0, 0.0)
        for ask in (actor.plan, actor.apply):
            with pytest.raises(error, match=says):
                await ask(values)
        after = await actor.settle(0.0, 0.0)
        assert (after.declared, after.pending) == (before.declared, ())
        assert await actor.config() == CONFIG
        await actor.stop()

    run(check)


def test_scale_and_drain_may_be_asked_again() -> None:
    async def check() -> None:
        actor = await started(CONFIG)
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
        await actor.stop()

    run(check)


def test_controller_has_the_small_files_that_workers_have_read(ray: FakeRay) -> None:
    async def check() -> None:
        files = SmallFiles.read(DEMO_DIR)
        actor = ControllerActor(CONFIG, 5.0)
        await actor.begin()
        assert await actor.small_files(flat(CONFIG)) is None
        ray.fleets[1].small_files = files
        while (found := await actor.small_files(flat(CONFIG))) is None:
            await actor._all.serving.changed(0.02)
        assert found == files
        other = changed(CONFIG, {"model.name": "other"})
        assert await actor.small_files(flat(other)) is None
        await actor.stop()

    run(check)


def test_next_controller_keeps_the_model_of_the_workers_that_run(ray: FakeRay) -> None:
    async def check() -> None:
        first = await started(CONFIG)
        await first.apply({"workers.count": 4})
        await first.settle(0.0, TIMEOUT_S)
        await asyncio.sleep(0.1)
        controller = first._all.serving.controller
        ray.die(first)
        # An ingress of another model starts it, and knows nothing of the others.
        other = changed(CONFIG, {"model.name": "other"})
        second = await started(other, at_s=controller.declared.at_s + 1.0)
        assert await second.config() == changed(CONFIG, {"workers.count": 4})
        status = await second.settle(0.0, TIMEOUT_S)
        assert "needs a new generation: model.name: '' -> 'other'" in status.problem
        with pytest.raises(ChangeRefusedError):
            await second.declare(Declared(values=flat(other), at_s=controller.declared.at_s + 1.0))
        assert (await second.view(0, 1.0)).declared.values["model.name"] == ""
        await second.stop()

    assert EMPTY_VIEW.declared == Declared()
    run(check)
