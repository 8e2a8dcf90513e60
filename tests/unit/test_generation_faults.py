"""Changes of generations that meet other changes, slow disks, and deaths at the wrong moment."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from milliways.cluster.control import generations
from milliways.cluster.ray import controller_actor, generation_set
from milliways.cluster.ray.controller_actor import ControllerActor
from milliways.cluster.ray.generation import RunningGeneration
from milliways.cluster.settings.names import changed, flat
from milliways.wire.errors import ChangeRefusedError
from milliways.wire.view import EMPTY_VIEW, Declared, WorkerState
from tests import fake_fleet
from tests.fake_ray import TIMEOUT_S, FakeRay, ray, run, started
from tests.unit.test_generation_changes import CONFIG, NEW, OTHER, Replica, prepared

__all__ = ["ray"]


@pytest.fixture(autouse=True)
def quick(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_actor, "LOOK_PERIOD_S", 0.01)


class SlowDisk:
    """Checks of files take until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_checks = 0
        self._may_end = threading.Event()
        self._check = generation_set.check_files
        monkeypatch.setattr(generation_set, "check_files", self.check)

    def check(self, settings: Any) -> Any:
        self.num_checks += 1
        assert self._may_end.wait(TIMEOUT_S)
        return self._check(settings)

    def release(self) -> None:
        self._may_end.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.release()


async def both(ray: FakeRay) -> tuple[ControllerActor, Replica]:
    """A controller whose generation 1 is followed, and whose generation 2 is prepared."""
    actor = await started(CONFIG)
    old = Replica("old", CONFIG)
    await old.ask(actor)
    await prepared(actor)
    return actor, old


# The next controller


def test_next_controller_knows_workers_without_a_view_by_their_settings(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker became ready after its controller had died."""

    async def check() -> None:
        first, old = await both(ray)
        ray.die(first)
        found = replace(ray.existing[2][0], view=EMPTY_VIEW, settings=NEW.values)
        ray.existing[2] = [found]
        for limit in ("FORGET_AFTER_S", "UNHEARD_S"):
            monkeypatch.setattr(generations, limit, 0.1)
        second = ControllerActor(CONFIG, 5.0)
        await second.begin(old.known)
        assert second._all.running[2].controller.declared.values["model.name"] == "other"
        while ray.ended != [2]:
            view = await old.ask(second)
            assert (view.generation, view.declared.values["model.name"]) == (1, "")
            await second._all.serving.changed(0.02)
        assert len(old.known.routers()) == 3
        await second.stop()

    run(check)


def test_generation_that_cannot_go_on_ends_and_the_other_one_serves(ray: FakeRay) -> None:
    async def check() -> None:
        first, old = await both(ray)
        ray.die(first)
        settings = {**NEW.values, "model.manifest": "/gone.json"}
        ray.existing[2] = [replace(ray.existing[2][0], view=EMPTY_VIEW, settings=settings)]
        second = ControllerActor(CONFIG, 5.0)
        await second.begin(old.known)
        assert ray.ended == [2] and sorted(second._all.running) == [1]
        assert len((await old.ask(second)).routers()) == 3
        assert "generation 2 ends: manifest /gone.json" in (await second.settle(0.0, 0.0)).problem
        await second.stop()

    run(check)


def test_beginning_that_fails_leaves_no_controller_behind(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        first, old = await both(ray)
        ray.die(first)
        begun: list[RunningGeneration] = []
        start = RunningGeneration.start

        def start_or_fail(self: RunningGeneration, *arguments: Any, **more: Any) -> None:
            begun.append(self)
            if len(begun) == 2:
                raise OSError("for a moment")
            start(self, *arguments, **more)

        monkeypatch.setattr(RunningGeneration, "start", start_or_fail)
        second = ControllerActor(CONFIG, 5.0)
        with pytest.raises(OSError, match="for a moment"):
            await second.begin(old.known)
        await second.begin(old.known)
        assert [generation.number for generation in begun] == [1, 2, 1, 2]
        assert [generation.shell._is_closed for generation in begun] == [True, True, False, False]
        assert ray.ended == []
        await second.stop()

    run(check)


def test_old_generation_whose_workers_died_with_the_controller_is_started_again(
    ray: FakeRay,
) -> None:
    async def check() -> None:
        first, old = await both(ray)
        ray.die(first)
        del ray.workers[1], ray.existing[1]
        second = ControllerActor(CONFIG, 5.0)
        await second.begin(old.known)
        assert sorted(second._all.running) == [1, 2]
        while not (await old.ask(second)).routers():
            await second._all.serving.changed(0.02)
        assert (old.known.generation, old.known.declared.values["model.name"]) == (1, "")
        await second.stop()

    run(check)


# How a new generation ends


class LateClock:
    """A clock by which all time limits are over."""

    def now_s(self) -> float:
        return time.monotonic() + 1e6


def test_generation_that_is_complete_is_not_given_up_however_long_it_waits(ray: FakeRay) -> None:
    async def check() -> None:
        actor, _ = await both(ray)
        actor._all.running[2].shell.tasks.clock = LateClock()
        for _ in range(3):
            actor._all.look()
            assert (await actor.prepare(NEW, TIMEOUT_S)).is_complete
        assert ray.ended == []
        await actor.stop()

    run(check)


def test_reason_for_which_a_generation_was_given_up_is_kept(ray: FakeRay) -> None:
    async def check() -> None:
        ray.unreadable = {"worker-1"}
        actor = await started(CONFIG)
        await Replica("old", CONFIG).ask(actor)
        for _ in range(2):
            with pytest.raises(ChangeRefusedError, match=r"was given up.*: worker-1 cannot load"):
                await actor.prepare(NEW, TIMEOUT_S)
            # Another replica of the old settings.
            await actor.declare(Declared(values=flat(CONFIG), at_s=5.0))
        await actor.stop()

    run(check)


def test_generation_whose_ingress_never_was_healthy_does_not_serve(ray: FakeRay) -> None:
    async def check() -> None:
        actor, _ = await both(ray)
        new = Replica("new", OTHER)
        new.is_healthy = False
        # Serve replaces it again and again.
        assert (await new.ask(actor)).generation == 2
        assert await actor.config() == CONFIG
        assert await actor.abandon(NEW.values)
        assert ray.ended == [2]
        await actor.scale(2)
        await prepared(actor)
        new.is_healthy = True
        assert (await new.ask(actor)).generation == 2
        assert await actor.config() == OTHER
        assert not await actor.abandon(NEW.values)
        await actor.stop()

    run(check)


def test_generation_lives_while_an_ingress_waits_to_be_healthy(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        monkeypatch.setattr(generations, "FORGET_AFTER_S", 0.5)
        actor, old = await both(ray)
        new = Replica("new", OTHER)
        new.is_healthy = False
        until_s = time.monotonic() + 1.5
        while time.monotonic() < until_s:
            assert (await new.ask(actor)).generation == 2
            assert (await old.ask(actor)).generation == 1
            await asyncio.sleep(0.01)
        assert ray.ended == []
        await actor.stop()

    run(check)


# Other changes


@pytest.mark.parametrize("values", [NEW.values, flat(changed(OTHER, {"workers.count": 4}))])
def test_new_generation_is_refused_while_the_cluster_grows(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        monkeypatch.setattr(fake_fleet, "SPAWN_S", 0.2)
        growing = asyncio.create_task(actor.scale(5))
        while not actor._all.serving.controller.is_changing:
            await asyncio.sleep(0)
        new = Declared(values=values, at_s=10.0)
        for ask in (actor.plan(values), actor.prepare(new, TIMEOUT_S)):
            with pytest.raises(ChangeRefusedError, match="another change of the cluster goes on"):
                await ask
        await growing
        assert sorted(ray.fleets) == [1]
        await actor.stop()

    run(check)


def test_change_that_begins_while_files_are_checked_refuses_the_new_generation(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, slow: SlowDisk
) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        preparing = asyncio.create_task(actor.prepare(NEW, TIMEOUT_S))
        while not slow.num_checks:
            await asyncio.sleep(0.01)
        # However busy this machine is, the change goes on until it is cancelled.
        monkeypatch.setattr(fake_fleet, "SPAWN_S", TIMEOUT_S)
        growing = asyncio.create_task(actor.scale(5))
        while not actor._all.serving.controller.is_changing:
            await asyncio.sleep(0)
        slow.release()
        with pytest.raises(ChangeRefusedError, match="another change of the cluster goes on"):
            await preparing
        growing.cancel()
        assert sorted(ray.fleets) == [1]
        await actor.stop()

    run(check)


def test_way_back_with_other_settings_is_refused_before_anything_changes(ray: FakeRay) -> None:
    async def check() -> None:
        actor, _ = await both(ray)
        await Replica("new", OTHER).ask(actor)
        back = {"model.name": "", "workers.count": 4}
        new = Declared(values=flat(changed(OTHER, back)), at_s=20.0)
        for ask in (actor.plan(back), actor.prepare(new, TIMEOUT_S)):
            with pytest.raises(ChangeRefusedError, match="generation 1 ends when its requests"):
                await ask
        # With the settings that it has, it may serve again.
        same = Declared(values=flat(CONFIG), at_s=20.0)
        assert (await actor.prepare(same, TIMEOUT_S)).generation == 1
        await actor.stop()

    run(check)


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.LOADING])
def test_whoever_drains_a_worker_hears_that_its_generation_ends(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, state: WorkerState
) -> None:
    async def check() -> None:
        actor, _ = await both(ray)
        monkeypatch.setattr(fake_fleet, "SPAWN_S", TIMEOUT_S)
        draining = asyncio.create_task(actor.drain("worker-1", True))
        workers = actor._all.running[1].controller.workers
        while workers["worker-1"].state is not state:
            await asyncio.sleep(0.01)
        await Replica("new", OTHER).ask(actor)
        await actor.unfollow("old")
        with pytest.raises(ChangeRefusedError, match="generation 1 ended: nobody needs it"):
            await draining
        assert ray.ended == [1]
        await actor.stop()

    run(check)


def test_ingress_replica_with_older_settings_is_named_until_it_leaves(ray: FakeRay) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        old = Replica("old", CONFIG)
        await old.ask(actor)
        assert "ingress-old" not in (await actor.settle(0.0, 0.0)).unconfirmed
        values = {"ingress.grace_s": 9.0}
        await actor.apply(values)
        new = Replica("new", changed(CONFIG, values))
        await new.ask(actor)
        assert "ingress-old" in (await actor.settle(0.0, 0.0)).unconfirmed
        assert "ingress-new" not in (await actor.settle(0.0, 0.0)).unconfirmed
        await actor.unfollow("old")
        assert "ingress-old" not in (await actor.settle(0.0, 0.0)).unconfirmed
        await actor.stop()

    run(check)


# Slow disks, and many questions


def test_whoever_prepares_gets_an_answer_while_files_are_checked(
    ray: FakeRay, slow: SlowDisk
) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        for _ in range(2):
            status = await actor.prepare(NEW, 0.01)
            assert (status.generation, status.num_ready, status.is_complete) == (2, 0, False)
            assert status.text == "the files of its model are checked"
        third = Declared(values=flat(changed(CONFIG, {"model.name": "third"})), at_s=11.0)
        with pytest.raises(ChangeRefusedError, match="about to change to other workers"):
            await actor.prepare(third, TIMEOUT_S)
        slow.release()
        await prepared(actor)
        assert slow.num_checks == 1
        await actor.stop()

    run(check)


def test_generation_that_is_taken_back_while_its_files_are_checked_does_not_start(
    ray: FakeRay, slow: SlowDisk
) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        preparing = asyncio.create_task(actor.prepare(NEW, TIMEOUT_S))
        while not slow.num_checks:
            await asyncio.sleep(0.01)
        await actor.abandon(NEW.values)
        with pytest.raises(ChangeRefusedError, match="taken back"):
            await preparing
        slow.release()
        assert sorted(ray.fleets) == [1]
        await prepared(actor)
        await actor.stop()

    run(check)


def test_questions_for_a_newer_view_leave_nothing_behind(ray: FakeRay) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        generation = actor._all.serving
        while await generation.changed(0.2):
            # The cluster has just started.
            pass
        change = generation.controller.changed.wait()
        num_before = len(change._callbacks)
        for _ in range(20):
            assert not await generation.changed(0.0)
        assert len(change._callbacks) == num_before
        await actor.stop()

    run(check)
