"""A cluster changes to workers of another model, and back if that fails; controllers die meanwhile.

The controller's actor is the real one; its fleets are fakes, and so are the ingress replicas.
"""

# Ray's own types are unknown in part.
# pyright: basic

from typing import Any

import pytest

from milliways.cluster.control import generations
from milliways.cluster.control.generations import Follower
from milliways.cluster.ray import controller_actor
from milliways.cluster.ray.controller_actor import ControllerActor
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.wire.errors import ChangeRefusedError
from milliways.wire.view import EMPTY_VIEW, ClusterView, Declared
from tests.fake_ray import TIMEOUT_S, FakeRay, ray, run, started

__all__ = ["ray"]

CONFIG = ClusterConfig()
# The same files under another name are another generation.
OTHER = changed(CONFIG, {"model.name": "other"})
NEW = Declared(values=flat(OTHER), at_s=10.0)


@pytest.fixture(autouse=True)
def quick(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_actor, "LOOK_PERIOD_S", 0.01)


class Replica:
    """An ingress replica, as far as the controller knows it."""

    def __init__(self, name: str, config: ClusterConfig) -> None:
        self.name = name
        self.values = flat(config)
        self.known: ClusterView = EMPTY_VIEW
        self.is_healthy = True

    async def ask(self, actor: ControllerActor) -> ClusterView:
        """Asks once for a view."""
        generation = self.known.generation
        follower = Follower(
            follower_id=self.name,
            values=self.values,
            generation=generation,
            is_healthy=self.is_healthy,
        )
        self.known = await actor.view(0, TIMEOUT_S, follower)
        return self.known


async def until(actor: ControllerActor, numbers: set[int]) -> None:
    """Waits until there are exactly these generations."""
    while {g.generation for g in (await actor.status()).generations} != numbers:
        await actor._all.serving.changed(0.02)


async def prepared(actor: ControllerActor) -> None:
    status = await actor.prepare(NEW, TIMEOUT_S)
    assert (status.generation, status.is_complete, status.serves) == (2, True, False)


def test_new_workers_serve_when_an_ingress_follows_and_old_ones_end_when_none_does(
    ray: FakeRay,
) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        old, new = Replica("old", CONFIG), Replica("new", OTHER)
        assert (await old.ask(actor)).generation == 1
        lines = await actor.plan({"model.name": "other"})
        assert lines[0] == "model.name: '' -> 'other' (as a new generation)"
        assert lines[1].startswith("3 new workers have room: each takes 1 CPU; together they need ")
        await prepared(actor)
        assert (await actor.config(), (await old.ask(actor)).generation) == (CONFIG, 1)
        pending = "model.name: '' -> 'other': generation 2 is complete, and has no ingress yet"
        assert (await actor.settle(0.0, 0.0)).pending == (pending,)
        assert (await new.ask(actor)).generation == 2
        assert await actor.config() == OTHER
        assert (await old.ask(actor)).generation == 1
        status = await actor.settle(NEW.at_s, 0.0)
        assert status.pending == ("generation 1 ends when its requests have ended",)
        assert ray.ended == []
        await actor.unfollow("old")
        status = await actor.settle(NEW.at_s, TIMEOUT_S)
        assert (status.pending, status.problem, ray.ended) == ((), "", [1])
        # One that was away for long gets no view of another model as its own.
        assert (await old.ask(actor)).declared.values["model.name"] == "other"
        await actor.stop()

    run(check)


@pytest.mark.parametrize(
    ("free", "says"),
    [
        ({"CPU": 64.0, "memory": 1e6}, "needs .* MB, has 3 x"),
        (
            {"CPU": 2.0, "memory": 1e12},
            "no room for 3 workers beside the present ones: 2 have room",
        ),
    ],
)
def test_without_room_everything_stays_as_it_was(
    ray: FakeRay, free: dict[str, float], says: str
) -> None:
    async def check() -> None:
        ray.free = free
        actor = await started(CONFIG)
        before = await actor.settle(0.0, 0.0)
        for ask in (actor.plan({"model.name": "other"}), actor.prepare(NEW, TIMEOUT_S)):
            with pytest.raises(ChangeRefusedError, match=f"model.name.*'other', and: {says}"):
                await ask
        after = await actor.settle(0.0, 0.0)
        assert (after.declared, after.pending) == (before.declared, ())
        assert "model.name" in after.problem and sorted(ray.fleets) == [1]
        await actor.stop()

    run(check)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model.path": "/m"}, "/m: no such model directory"),
        ({"model.manifest": "/m.json"}, "/m.json"),
        ({"model.name": "other", "ingress.port": 9}, "needs a new start of the cluster"),
    ],
)
def test_what_cannot_be_read_or_changed_is_refused_at_once(
    ray: FakeRay, values: dict[str, Any], says: str
) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        new = Declared(values=flat(changed(CONFIG, values)), at_s=10.0)
        for ask in (actor.plan(values), actor.prepare(new, TIMEOUT_S)):
            with pytest.raises(ChangeRefusedError, match=says):
                await ask
        assert sorted(ray.fleets) == [1]
        await actor.stop()

    run(check)


def test_new_workers_that_cannot_load_are_given_up(ray: FakeRay) -> None:
    async def check() -> None:
        ray.unreadable = {"worker-1"}
        actor = await started(CONFIG)
        old = Replica("old", CONFIG)
        await old.ask(actor)
        says = "generation 2 was given up, and all is as before: worker-1 cannot load"
        # The second time it is the same declaration, as of a replica that starts again.
        for _ in range(2):
            with pytest.raises(ChangeRefusedError, match=says):
                await actor.prepare(NEW, TIMEOUT_S)
        assert ray.ended == [2]
        status = await actor.settle(0.0, 0.0)
        assert status.pending == () and says in status.problem
        assert await actor.config() == CONFIG
        ray.unreadable = set()
        again = Declared(values=NEW.values, at_s=11.0)
        assert (await actor.prepare(again, TIMEOUT_S)).is_complete
        await actor.stop()

    run(check)


def test_nothing_else_changes_while_generations_do(ray: FakeRay) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        await prepared(actor)
        third = Declared(values=flat(changed(CONFIG, {"model.name": "third"})), at_s=11.0)
        asks = (
            actor.prepare(third, TIMEOUT_S),
            actor.plan({"workers.count": 4}),
            actor.apply({"workers.count": 4}),
            actor.scale(4),
        )
        for ask in asks:
            with pytest.raises(ChangeRefusedError, match="changes to other workers"):
                await ask
        await actor.abandon(NEW.values)
        assert ray.ended == [2]
        await actor.scale(4)
        await actor.stop()

    run(check)


def test_next_controller_goes_on_with_what_is_prepared_if_somebody_asks(ray: FakeRay) -> None:
    async def check() -> None:
        first = await started(CONFIG)
        old = Replica("old", CONFIG)
        await old.ask(first)
        await prepared(first)
        pids = [record.member().pid for record in first._all.running[2].controller.workers.values()]
        ray.die(first)
        # An ingress of the old generation starts it.
        second = ControllerActor(CONFIG, 5.0)
        await second.begin(old.known)
        await old.ask(second)
        assert await second.config() == CONFIG
        await prepared(second)
        workers = second._all.running[2].controller.workers.values()
        assert [record.member().pid for record in workers] == pids
        assert (await Replica("new", OTHER).ask(second)).generation == 2
        assert await second.config() == OTHER
        await second.stop()

    run(check)


def test_next_controller_undoes_what_nobody_asks_for(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        first = await started(CONFIG)
        old = Replica("old", CONFIG)
        await old.ask(first)
        await prepared(first)
        ray.die(first)
        for limit in ("FORGET_AFTER_S", "UNHEARD_S"):
            monkeypatch.setattr(generations, limit, 0.2)
        second = ControllerActor(CONFIG, 5.0)
        await second.begin(old.known)
        while ray.ended != [2]:
            await old.ask(second)
            await second._all.serving.changed(0.02)
        assert (await second.settle(0.0, 0.0)).pending == ()
        await second.stop()

    run(check)


@pytest.mark.parametrize("starter", ["old", "new"])
def test_next_controller_completes_a_change_that_an_ingress_follows(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, starter: str
) -> None:
    async def check() -> None:
        monkeypatch.setattr(generations, "UNHEARD_S", 1.0)
        first = await started(CONFIG)
        replicas = {"old": Replica("old", CONFIG), "new": Replica("new", OTHER)}
        await replicas["old"].ask(first)
        await prepared(first)
        await replicas["new"].ask(first)
        ray.die(first)
        config = CONFIG if starter == "old" else OTHER
        second = ControllerActor(config, 5.0)
        await second.begin(replicas[starter].known)
        for number, replica in enumerate(replicas.values(), start=1):
            assert (await replica.ask(second)).generation == number
        assert await second.config() == OTHER
        await second.unfollow("old")
        while ray.ended != [1]:
            assert (await replicas["new"].ask(second)).generation == 2
            await second._all.serving.changed(0.02)
        status = await second.settle(NEW.at_s, TIMEOUT_S)
        assert (status.pending, status.problem, ray.ended) == ((), "", [1])
        await second.stop()

    run(check)


def test_next_controller_starts_a_generation_again_whose_workers_all_died_with_the_last(
    ray: FakeRay,
) -> None:
    async def check() -> None:
        first = await started(CONFIG)
        old, new = Replica("old", CONFIG), Replica("new", OTHER)
        await old.ask(first)
        await prepared(first)
        await new.ask(first)
        ray.die(first)
        del ray.workers[2], ray.existing[2]
        second = ControllerActor(OTHER, 10.0)
        await second.begin(new.known)
        await until(second, {1, 2})
        while (await new.ask(second)).generation != 2 or not new.known.routers():
            await second._all.serving.changed(0.02)
        incarnations = [r.incarnation for r in second._all.running[2].controller.workers.values()]
        assert incarnations == [2, 2, 2]
        await second.stop()

    run(check)


def test_an_ingress_of_a_generation_that_was_not_prepared_prepares_it(ray: FakeRay) -> None:
    async def check() -> None:
        actor = await started(CONFIG)
        with pytest.raises(ChangeRefusedError, match=r"needs a new generation: model\.name"):
            await actor.declare(NEW)
        new = Replica("new", OTHER)
        assert (await new.ask(actor)).generation == 1
        await prepared(actor)
        assert (await actor.declare(NEW)).at_s == NEW.at_s
        assert (await new.ask(actor)).generation == 2
        await actor.stop()

    run(check)
