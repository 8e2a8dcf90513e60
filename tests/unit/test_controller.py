"""The controller over workers that obey, die and do not listen, on a fake clock."""

from itertools import pairwise

import pytest

from milliways.cluster.control.deaths import BACKOFF_S_MAX, STABLE_AFTER_S
from milliways.cluster.control.fleet import Existing
from milliways.cluster.control.planner import AttentionCut
from milliways.wire.errors import PlacementError
from milliways.wire.view import WorkerState
from tests.fake_fleet import EVERY_EXPERT, LOAD_S, MODEL, SPAWN_S, Bench


def test_start_places_loads_and_tells_everybody() -> None:
    bench = Bench(3).start()
    assert bench.run_until(bench.is_up) == SPAWN_S + LOAD_S
    bench.run_for(1.0)
    bench.check()
    assert set(bench.replicas().values()) == {2}
    assert [m.worker_id for m in bench.controller.view.routers()] == [
        "worker-0",
        "worker-1",
        "worker-2",
    ]
    assert bench.controller.figures.num_deaths == 0
    assert {record.waits_for for record in bench.controller.workers.values()} == {""}


def test_views_and_fences_only_ever_grow() -> None:
    bench = Bench(3).start().up()
    for victim in ("worker-1", "worker-2", "worker-1"):
        bench.fleet.kill(victim)
        bench.up()
    for worker in bench.fleet.all_workers:
        epochs = [view.placement_epoch for view in worker.views]
        assert epochs == sorted(set(epochs))
        assert worker.fences == sorted(set(worker.fences))
        assert set(worker.fences) <= set(epochs)


def test_start_waits_for_all_workers_and_says_so() -> None:
    bench = Bench(3)
    bench.fleet.without_node.add("worker-1")
    bench.start().run_for(100.0)
    waits = {name: bench.controller.waits_for(r) for name, r in bench.controller.workers.items()}
    assert waits["worker-0"] == waits["worker-2"] == "a placement, which needs all workers"
    assert waits["worker-1"] == "a node with 1 FAKE"
    assert bench.controller.view.members == {}


def test_plan_that_does_not_fit_is_refused_with_its_arithmetic() -> None:
    bench = Bench(2, memory_bytes=50).start()
    bench.run_for(10.0)
    failure = bench.controller.failure
    assert isinstance(failure, PlacementError)
    assert "short" in str(failure) and "2 x" in str(failure)
    assert all(worker.shards is None for worker in bench.fleet.all_workers)


def test_death_while_loading_is_another_try() -> None:
    bench = Bench(3)
    bench.fleet.dies_loading.add("worker-2")
    bench.start()
    bench.run_until(lambda: bench.controller.figures.num_deaths == 1)
    bench.fleet.dies_loading.clear()
    bench.up()
    record = bench.controller.workers["worker-2"]
    assert record.incarnation == 2
    assert set(bench.replicas().values()) == {2}
    bench.check()


def test_death_while_all_load_has_nobody_load_the_whole_model() -> None:
    # Just enough for what each is to hold; the fleet refuses more.
    bench = Bench(4, replicas=1, memory_bytes=20 + 20)
    bench.fleet.dies_loading.add("worker-3")
    bench.start()
    bench.run_until(lambda: bench.controller.figures.num_deaths == 1)
    bench.fleet.dies_loading.clear()
    bench.up()
    assert bench.controller.figures.num_take_overs == 0
    assert set(bench.replicas().values()) == {1}


def test_view_without_the_dead_is_out_at_once() -> None:
    bench = Bench(3).start().up()
    epoch = bench.controller.view.placement_epoch
    bench.fleet.kill("worker-1")
    assert bench.run_until(lambda: bench.controller.view.placement_epoch > epoch) == 0.0
    assert bench.controller.view.members["worker-1"].state is WorkerState.LOST
    assert min(bench.replicas().values()) == 1
    assert bench.controller.figures.num_take_overs == 0
    bench.up()
    assert set(bench.replicas().values()) == {2}
    bench.check()


def test_others_load_what_the_last_holder_had() -> None:
    bench = Bench(3, replicas=1).start().up()
    lost = bench.controller.view.members["worker-1"].experts
    bench.fleet.without_node.add("worker-1")
    bench.fleet.kill("worker-1")
    bench.run_for(0.0)
    assert bench.run_until(lambda: bench.controller.is_complete) == LOAD_S
    bench.run_for(1.0)
    holders = [bench.controller.view.holders(expert_id) for expert_id in sorted(lost)]
    # Shared out among those that are left.
    assert {m.worker_id for members in holders for m in members} == {"worker-0", "worker-2"}
    bench.check()


def test_who_comes_back_takes_its_experts_back() -> None:
    bench = Bench(3, replicas=1).start().up()
    before = {m.worker_id: m.experts for m in bench.controller.view.members.values()}
    bench.fleet.kill("worker-1")
    bench.run_until(lambda: bench.controller.figures.num_take_overs == 2)
    bench.up()
    assert {m.worker_id: m.experts for m in bench.controller.view.members.values()} == before
    bench.check()


def test_death_of_who_takes_over_is_taken_over_too() -> None:
    bench = Bench(3, replicas=1).start().up()
    bench.fleet.without_node |= {"worker-1", "worker-2"}
    bench.fleet.kill("worker-1")
    bench.run_for(LOAD_S / 2)
    bench.fleet.kill("worker-2")
    bench.run_until(lambda: bench.controller.is_complete)
    bench.run_for(1.0)
    assert bench.controller.view.members["worker-0"].experts == EVERY_EXPERT
    bench.check()


def test_nobody_takes_over_more_than_fits() -> None:
    # 20 for attention. Of the dead worker's three experts one fits, on the worker that has two.
    bench = Bench(3, replicas=1, memory_bytes=20 + 30).start().up()
    bench.fleet.kill("worker-1")
    bench.run_for(LOAD_S)
    assert sorted(bench.replicas().values()) == [0, 0, 1, 1, 1, 1, 1, 1]
    bench.up()
    assert set(bench.replicas().values()) == {1}
    bench.check()


def test_all_die_at_once_and_all_come_back() -> None:
    bench = Bench(3).start().up()
    for worker_id in list(bench.fleet.now):
        bench.fleet.kill(worker_id)
    bench.run_for(0.1)
    assert bench.controller.view.routers() == () and not bench.controller.is_complete
    bench.up()
    assert set(bench.replicas().values()) == {2}
    bench.check()


def test_pauses_grow_while_it_keeps_dying_and_others_serve_on() -> None:
    bench = Bench(3).start().up()
    bench.fleet.dies_loading.add("worker-1")
    bench.fleet.kill("worker-1")
    record = bench.controller.workers["worker-1"]
    births: list[float] = []
    for number in range(2, 12):
        bench.run_until(lambda number=number: record.incarnation == number)
        births.append(bench.clock.now_s())
    pauses = [later - earlier for earlier, later in pairwise(births)]
    assert pauses == sorted(pauses)
    assert BACKOFF_S_MAX <= pauses[-1] <= BACKOFF_S_MAX + SPAWN_S + 2 * LOAD_S
    bench.run_until(lambda: "times in a row" in record.waits_for)
    assert bench.controller.is_complete
    bench.fleet.dies_loading.clear()
    bench.up()
    # Who lived well for long starts anew.
    bench.run_for(STABLE_AFTER_S)
    bench.fleet.kill("worker-1")
    bench.run_for(0.1)
    assert record.num_quick_deaths == 0


def test_who_does_not_listen_keeps_nobody_waiting_and_hears_it_later() -> None:
    bench = Bench(3).start().up()
    bench.fleet.silent.add("worker-0")
    bench.fleet.kill("worker-2")
    bench.up()
    bench.run_for(20.0)
    view = bench.controller.view
    assert bench.fleet.now["worker-1"].views[-1] == view
    assert bench.fleet.now["worker-0"].views[-1] != view
    bench.fleet.silent.clear()
    bench.run_for(20.0)
    bench.check()


def test_nobody_is_started_again_after_the_end() -> None:
    bench = Bench(3).start().up()
    bench.controller.close()
    bench.fleet.kill("worker-1")
    bench.run_for(100.0)
    assert len(bench.fleet.all_workers) == 3


@pytest.mark.parametrize("dead", [(), ("worker-1",)])
def test_new_controller_goes_on_with_the_workers_that_there_are(dead: tuple[str, ...]) -> None:
    old = Bench(3).start().up()
    existing: list[Existing] = []
    for record in old.controller.workers.values():
        worker = old.fleet.now[record.worker_id]
        if record.worker_id not in dead:
            assert record.spawned is not None and worker.shards is not None
            existing.append(
                Existing(
                    worker_id=record.worker_id,
                    incarnation=record.incarnation,
                    spawned=record.spawned,
                    shards=worker.shards,
                    held=worker.held,
                    view=worker.views[-1],
                )
            )
    new = Bench(3)
    new.fleet.now = {name: w for name, w in old.fleet.now.items() if name not in dead}
    new.fleet.all_workers = list(old.fleet.all_workers)
    epoch = old.controller.view.placement_epoch
    new.start(existing).run_for(0.1)
    # Should this one die as well before all are back, the next still knows of everybody.
    assert sorted(new.controller.view.members) == ["worker-0", "worker-1", "worker-2"]
    new.up()
    assert new.controller.view.placement_epoch > epoch
    assert [w.worker_id for w in new.fleet.all_workers[3:]] == list(dead)
    assert set(new.replicas().values()) == {2}
    new.check()


def test_new_controller_goes_on_behind_the_view_that_others_know_where_no_worker_lives() -> None:
    old = Bench(3).start().up()
    for _ in range(3):
        old.fleet.kill("worker-1")
        old.up()
    known = old.controller.view
    new = Bench(2)
    new.controller.start(known=known)
    new.up()
    assert new.controller.view.placement_epoch > known.placement_epoch
    # As many workers as before, and no incarnation has the number of an earlier one.
    incarnations = {m.worker_id: m.incarnation for m in new.controller.view.members.values()}
    assert incarnations == {"worker-0": 2, "worker-1": 5, "worker-2": 2}
    new.check()


def test_controller_overtakes_a_later_view_that_somebody_knows() -> None:
    bench = Bench(2).start().up()
    bench.controller.overtake(3)
    assert bench.controller.view.placement_epoch < 40
    bench.controller.overtake(46)
    bench.run_for(1.0)
    view = bench.controller.view
    assert view.placement_epoch == 47
    assert [w.views[-1] for w in bench.fleet.now.values()] == [view, view]
    bench.check()


def test_cut_attention_has_one_router_which_stops_with_its_chain() -> None:
    bench = Bench(2, cut=AttentionCut.LAYERS).start().up()
    assert [m.worker_id for m in bench.controller.view.routers()] == ["worker-0"]
    assert bench.controller.view.chains == {"worker-0": ("worker-0", "worker-1")}
    assert bench.controller.view.members["worker-1"].num_layers == MODEL.num_layers // 2
    bench.fleet.kill("worker-1")
    bench.run_for(0.1)
    assert bench.controller.view.routers() == ()
    bench.up()
    assert [m.worker_id for m in bench.controller.view.routers()] == ["worker-0"]
    bench.check()
