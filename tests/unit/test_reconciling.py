"""A running cluster comes to the settings that are declared: by a table, step by step."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from milliways.cluster.control.changes import (
    BY_WORKER,
    EFFECTS,
    GENERATION,
    Effect,
    differences,
    is_outdated,
    other_model,
    refusal,
)
from milliways.cluster.control.fleet import Existing
from milliways.cluster.control.planner import AttentionCut
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import declarations, flat
from milliways.wire.errors import PlacementError
from milliways.wire.view import Declared, WorkerState
from tests.fake_fleet import EVERY_EXPERT, Bench

VALUES = flat(ClusterConfig())


def declared(at_s: float = 1.0, **values: Any) -> Declared:
    """All settings, some with other values: `workers__count` stands for workers.count."""
    changed = {name.replace("__", "."): value for name, value in values.items()}
    assert changed.keys() <= VALUES.keys()
    return Declared(values=VALUES | {"workers.expert_replicas": 2} | changed, at_s=at_s)


def started(num_workers: int) -> Bench:
    bench = Bench(num_workers)
    bench.controller.declare(declared(workers__count=num_workers))
    return bench.start().up()


def existing(bench: Bench) -> list[Existing]:
    """What a new controller finds of a cluster."""
    return [
        Existing(
            worker_id=record.worker_id,
            incarnation=record.incarnation,
            spawned=record.spawned,
            shards=replace(worker.shards, experts=worker.held),
            held=worker.held,
            view=worker.views[-1],
            settings=record.started_with,
        )
        for record in bench.controller.workers.values()
        if (worker := bench.fleet.now[record.worker_id]).is_alive
        and record.spawned is not None
        and worker.shards is not None
    ]


def next_controller(old: Bench, num_workers: int = 3) -> Bench:
    """Another controller over the workers of one that died."""
    new = Bench(num_workers)
    new.fleet.now = {name: w for name, w in old.fleet.now.items() if w.is_alive}
    new.fleet.all_workers = [w for w in old.fleet.all_workers if w.shards is not None]
    new.start(existing(old))
    return new


def steps_until_settled(bench: Bench) -> Iterator[None]:
    """Yields after each event, until nothing is pending; an expert always has a holder."""

    def is_settled() -> bool:
        assert min(bench.replicas().values()) >= 1
        return bench.controller.reconciler.settled() and bench.is_up()

    while not is_settled():
        bench.run_for(0.25)
        yield
    bench.run_for(2.0)


def settle(bench: Bench) -> None:
    for _ in steps_until_settled(bench):
        assert bench.clock.now_s() < 600, bench.controller.pending


# The table


def test_table_says_of_every_setting_how_a_running_cluster_takes_it() -> None:
    assert set(EFFECTS) == {name for name, _ in declarations()}


def test_differences_are_in_words() -> None:
    changes = differences(VALUES, VALUES | {"workers.count": 5, "workers.threads_each": 2})
    assert [str(change) for change in changes] == [
        "workers.count: 3 -> 5 (live)",
        "workers.threads_each: 0 -> 2 (worker by worker)",
    ]


@pytest.mark.parametrize(
    ("name", "value", "num_workers", "says"),
    [
        ("model.path", "/m", 1, ""),
        ("ingress.port", 9, 3, "needs a new start of the cluster: ingress.port: 8000 -> 9"),
        ("workers.threads_each", 2, 1, "needs a second worker, which serves meanwhile: workers."),
        ("workers.threads_each", 2, 2, ""),
        ("workers.count", 5, 1, ""),
    ],
)
def test_change_that_a_running_cluster_cannot_take_is_refused(
    name: str, value: Any, num_workers: int, says: str
) -> None:
    reason = refusal(differences(VALUES, VALUES | {name: value}), num_workers)
    assert reason.startswith(says) and bool(reason) == bool(says)


def test_ingress_of_another_model_says_what_differs() -> None:
    assert other_model(VALUES, VALUES | {"workers.count": 9, "model.chat_template": "plain"}) == ""
    says = "model.path is 'demo' here and '/m' in the cluster"
    assert other_model(VALUES, VALUES | {"model.path": "/m"}) == says
    assert {"model.path", "model.name", "model.dtype"} <= set(GENERATION)


def test_only_settings_of_workers_make_a_worker_outdated() -> None:
    assert all(EFFECTS[name] is Effect.BY_WORKER for name in BY_WORKER)
    assert is_outdated(VALUES, VALUES | {"workers.transport": "grpc"})
    assert not is_outdated(VALUES, VALUES | {"workers.count": 9})
    assert not is_outdated({}, VALUES)


# The reconciler


@pytest.mark.parametrize("count", [2, 5])
def test_declared_number_of_workers_comes_about(count: int) -> None:
    bench = started(3)
    bench.controller.declare(declared(2.0, workers__count=count))
    assert bench.controller.pending == [f"workers.count: {count} declared, 3 ready"]
    settle(bench)
    assert sorted(bench.controller.workers) == [f"worker-{n}" for n in range(count)]
    assert set(bench.replicas().values()) == {2}
    assert bench.controller.pending == []
    bench.check()


def test_declared_number_of_replicas_comes_about() -> None:
    bench = started(3)
    for at_s, replicas in ((2.0, 3), (3.0, 1), (4.0, 0)):
        bench.controller.declare(declared(at_s, workers__expert_replicas=replicas))
        settle(bench)
        assert set(bench.replicas().values()) == {replicas or 2}
        bench.check()


def test_workers_are_started_again_one_after_another() -> None:
    bench = started(3)
    bench.controller.declare(declared(2.0, workers__threads_each=2))
    assert len(bench.controller.pending) == 3
    old = {"workers.threads_each": VALUES["workers.threads_each"]}
    assert bench.controller.by_worker == dict.fromkeys(("worker-0", "worker-1", "worker-2"), old)
    for _ in steps_until_settled(bench):
        records = bench.controller.workers.values()
        assert sum(record.state is not WorkerState.READY for record in records) <= 1
    records = bench.controller.workers.values()
    assert [record.incarnation for record in records] == [2, 2, 2]
    assert all(record.started_with["workers.threads_each"] == 2 for record in records)
    assert bench.controller.figures.num_deaths == 0
    assert bench.controller.by_worker == {}
    assert set(bench.replicas().values()) == {2}
    bench.check()


def test_worker_that_has_not_confirmed_live_settings_is_named() -> None:
    bench = started(3)
    bench.run_for(1.0)
    assert bench.controller.unconfirmed == ()
    bench.fleet.silent.add("worker-1")
    bench.controller.declare(declared(2.0, router__step_timeout_s=9.0))
    bench.run_for(30.0)
    assert bench.controller.unconfirmed == ("worker-1",)
    bench.fleet.silent.clear()
    bench.run_for(30.0)
    assert bench.controller.unconfirmed == ()
    assert bench.fleet.now["worker-1"].views[-1].declared.values["router.step_timeout_s"] == 9.0


def test_worker_that_dies_meanwhile_comes_back_with_the_new_settings() -> None:
    bench = started(3)
    bench.controller.declare(declared(2.0, workers__threads_each=2))
    bench.run_for(1.0)
    bench.fleet.kill("worker-2")
    bench.run_until(lambda: bench.controller.reconciler.settled() and bench.is_up())
    incarnations = {r.worker_id: r.incarnation for r in bench.controller.workers.values()}
    assert incarnations == {"worker-0": 2, "worker-1": 2, "worker-2": 2}


def test_older_declaration_changes_nothing() -> None:
    bench = started(3)
    bench.controller.declare(declared(3.0, workers__count=2))
    bench.controller.declare(declared(2.0, workers__count=5))
    settle(bench)
    assert len(bench.controller.workers) == 2


def test_step_that_fails_is_tried_again_and_says_why() -> None:
    bench = started(3)
    bench.fleet.memory_bytes = 10
    bench.controller.declare(declared(2.0, workers__count=4))
    bench.run_until(lambda: bool(bench.controller.reconciler.problem))
    assert "do not fit" in bench.controller.reconciler.problem
    assert bench.controller.pending == ["workers.count: 4 declared, 3 ready"]
    assert len(bench.controller.workers) == 3
    bench.fleet.memory_bytes = 1000
    settle(bench)
    assert len(bench.controller.workers) == 4 and bench.controller.reconciler.problem == ""


@pytest.mark.parametrize(
    ("bench", "values", "says"),
    [
        # Three hold 6 experts each; two would hold 8.
        (Bench(3, memory_bytes=20 + 60), {"workers.count": 2}, "short"),
        (Bench(3, memory_bytes=20 + 60), {"workers.expert_replicas": 3}, "short"),
        (Bench(3, cut=AttentionCut.LAYERS), {"workers.count": 1}, "layers of attention"),
        (Bench(3), {"workers.memory_gb_each": 1e-9}, "worker-0 needs "),
        (Bench(3), {"workers.kv_tokens": 10**6}, "worker-0 needs "),
        (Bench(3), {"workers.kv_tokens": 2}, ""),
        (Bench(3), {"workers.count": 9}, ""),
    ],
)
def test_settings_for_which_there_is_no_room_are_refused(
    bench: Bench, values: dict[str, Any], says: str
) -> None:
    bench.controller.declare(declared())
    bench.start().up()
    reason = bench.controller.refusal(dict(bench.controller.declared.values) | values)
    assert says in reason and bool(reason) == bool(says)


def test_scale_and_drain_declare_what_they_do() -> None:
    bench = started(3)
    task = bench.controller.scale(4)
    bench.run_until(lambda: task.is_done)
    assert bench.controller.declared.values["workers.count"] == 4
    task = bench.controller.drain("worker-1")
    bench.run_until(lambda: task.is_done)
    task.result()
    assert bench.controller.declared.values["workers.count"] == 3
    bench.run_for(60.0)
    states = {r.worker_id: r.state for r in bench.controller.workers.values()}
    assert states.pop("worker-1") is WorkerState.STOPPED
    assert set(states.values()) == {WorkerState.READY} and len(states) == 3


def test_refused_scale_declares_nothing() -> None:
    bench = Bench(3, replicas=3)
    bench.controller.declare(declared(workers__expert_replicas=3))
    bench.start().up()
    before = bench.controller.declared
    task = bench.controller.scale(2)
    bench.run_until(lambda: task.is_done)
    assert isinstance(task.error, PlacementError)
    assert bench.controller.declared == before


# The next controller


def test_next_controller_goes_on_with_what_was_declared() -> None:
    old = started(3)
    old.controller.declare(declared(2.0, workers__count=4, workers__threads_each=2))
    old.run_for(0.5)
    new = next_controller(old)
    # It comes from an ingress that has not heard of it.
    new.controller.declare(declared(1.0))
    settle(new)
    assert len(new.controller.workers) == 4
    records = new.controller.workers.values()
    assert all(record.started_with["workers.threads_each"] == 2 for record in records)
    new.check()


def test_next_controller_trims_copies_of_experts_that_nobody_wants() -> None:
    """A controller died within a growth: workers hold what they held, and what they loaded."""
    old = started(3)
    for worker in old.fleet.now.values():
        worker.held = EVERY_EXPERT
    new = next_controller(old)
    new.run_for(60.0)
    assert new.is_up()
    assert set(new.replicas().values()) == {2}
    assert sum(len(worker.held) for worker in new.fleet.now.values()) == 2 * len(EVERY_EXPERT)
    new.check()


def test_drained_worker_stays_away_under_the_next_controller() -> None:
    old = started(3)
    task = old.controller.drain("worker-1")
    old.run_until(lambda: task.is_done)
    old.run_for(10.0)
    new = next_controller(old)
    new.run_for(60.0)
    assert sorted(new.controller.workers) == ["worker-0", "worker-2"]
    assert new.controller.pending == []
    task = new.controller.scale(3)
    new.run_until(lambda: task.is_done)
    new.up()
    assert new.controller.workers["worker-1"].incarnation == 2
