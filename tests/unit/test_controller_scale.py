"""The controller grows, shrinks and drains: never without an expert, and not by halves."""

from collections.abc import Callable

import pytest

from milliways.cluster.control.planner import AttentionCut
from milliways.runtime.tasks import Task
from milliways.wire.errors import ClusterError, PlacementError, StartupError
from milliways.wire.view import WorkerState
from tests.fake_fleet import LOAD_S, MODEL, SPAWN_S, Bench


def change(bench: Bench, task: Task[None]) -> None:
    """Runs a change to its end; at no time is an expert without a holder."""

    def is_done() -> bool:
        assert min(bench.replicas().values()) >= 1
        return task.is_done

    bench.run_until(is_done)
    task.result()
    bench.up()


def test_growing_shares_out_anew_and_unloads_what_is_too_much() -> None:
    bench = Bench(2).start().up()
    change(bench, bench.controller.scale(4))
    assert sorted(bench.controller.workers) == [f"worker-{n}" for n in range(4)]
    assert set(bench.replicas().values()) == {2}
    held = [len(member.experts) for member in bench.controller.view.members.values()]
    assert held == [4, 4, 4, 4]
    bench.check()


def test_shrinking_hands_over_first() -> None:
    bench = Bench(4).start().up()
    leaving = [bench.fleet.now["worker-2"], bench.fleet.now["worker-3"]]
    change(bench, bench.controller.scale(2))
    assert sorted(bench.controller.workers) == ["worker-0", "worker-1"]
    assert set(bench.replicas().values()) == {2}
    assert all(worker.is_draining and not worker.is_alive for worker in leaving)
    assert bench.controller.figures.num_deaths == 0
    bench.check()


def test_growing_back_gives_new_lives() -> None:
    bench = Bench(3).start().up()
    change(bench, bench.controller.scale(2))
    change(bench, bench.controller.scale(3))
    assert bench.controller.workers["worker-2"].incarnation == 2
    bench.check()


Refused = Callable[[], Bench]


def without_memory() -> Bench:
    # Three hold 6 experts each; two would hold 8.
    return Bench(3, memory_bytes=20 + 60)


def below_replicas() -> Bench:
    return Bench(3, replicas=3)


def cut_by_layers() -> Bench:
    return Bench(3, cut=AttentionCut.LAYERS)


@pytest.mark.parametrize(
    ("make", "num_workers", "says"),
    [
        (without_memory, 2, "short"),
        (below_replicas, 2, "expert_replicas = 3"),
        (cut_by_layers, 1, "layers of attention"),
        (below_replicas, 0, "no workers"),
    ],
)
def test_refused_change_leaves_all_as_it_is(make: Refused, num_workers: int, says: str) -> None:
    bench = make().start().up()
    view = bench.controller.view
    task = bench.controller.scale(num_workers)
    bench.run_until(lambda: task.is_done)
    with pytest.raises(PlacementError, match=says):
        task.result()
    bench.run_for(10.0)
    assert bench.controller.view == view
    assert sorted(bench.controller.workers) == sorted(view.members)
    bench.check()


def test_new_workers_that_do_not_fit_go_again() -> None:
    bench = Bench(2).start().up()
    view = bench.controller.view
    # Now a worker has not even room for attention.
    bench.fleet.memory_bytes = 10
    task = bench.controller.scale(3)
    bench.run_until(lambda: task.is_done)
    assert isinstance(task.error, PlacementError)
    bench.run_for(10.0)
    assert bench.fleet.stopped == ["worker-2"]
    assert sorted(bench.controller.workers) == ["worker-0", "worker-1"]
    assert bench.controller.view == view


def test_growing_without_a_node_ends_and_says_what_is_missing() -> None:
    bench = Bench(2).start().up()
    bench.fleet.without_node.add("worker-3")
    task = bench.controller.scale(4)
    assert bench.run_until(lambda: task.is_done) == 60.0
    with pytest.raises(StartupError, match="worker-3 waits for a node with 1 FAKE"):
        task.result()
    bench.run_for(10.0)
    assert sorted(bench.controller.workers) == ["worker-0", "worker-1"]
    assert sorted(bench.fleet.stopped) == ["worker-2", "worker-3"]
    bench.check()


def test_one_change_at_a_time() -> None:
    bench = Bench(2).start().up()
    first = bench.controller.scale(3)
    bench.run_for(SPAWN_S / 2)
    for second in (bench.controller.scale(4), bench.controller.drain("worker-0")):
        bench.run_until(lambda second=second: second.is_done)
        assert isinstance(second.error, ClusterError)
    change(bench, first)
    assert len(bench.controller.workers) == 3
    change(bench, bench.controller.scale(2))
    assert len(bench.controller.workers) == 2


@pytest.mark.parametrize("dies_after_s", [0.5, SPAWN_S + 0.5, SPAWN_S + LOAD_S + 0.1])
@pytest.mark.parametrize("victim", ["worker-0", "worker-1", "worker-2"])
@pytest.mark.parametrize("num_workers", [2, 4])
def test_death_while_the_cluster_changes(
    num_workers: int, victim: str, dies_after_s: float
) -> None:
    bench = Bench(3).start().up()
    task = bench.controller.scale(num_workers)
    bench.run_for(dies_after_s)
    if victim in bench.controller.workers:
        bench.fleet.kill(victim)
    change(bench, task)
    assert len(bench.controller.workers) == num_workers
    assert set(bench.replicas().values()) == {2}
    bench.check()


def test_who_is_loading_meanwhile_loads_what_it_shall_hold_then() -> None:
    bench = Bench(3, replicas=1).start().up()
    bench.fleet.kill("worker-1")
    record = bench.controller.workers["worker-1"]
    bench.run_until(lambda: record.waits_for == "its shards to be loaded")
    bench.run_for(LOAD_S / 2)
    change(bench, bench.controller.scale(2))
    assert set(bench.replicas().values()) == {1}
    bench.check()


def test_plan_that_did_not_fit_fits_more_workers() -> None:
    bench = Bench(2, memory_bytes=20 + 40).start()
    bench.run_until(lambda: bench.controller.failure is not None)
    task = bench.controller.scale(4)
    bench.run_until(lambda: task.is_done)
    task.result()
    bench.up()
    assert bench.controller.failure is None
    assert set(bench.replicas().values()) == {2}


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_drained_worker_hands_everything_over(replicas: int, restarts: bool) -> None:
    bench = Bench(3, replicas=replicas).start().up()
    task = bench.controller.drain("worker-1", restarts=restarts)
    bench.run_until(lambda: task.is_done)
    task.result()
    assert bench.controller.is_complete
    assert bench.controller.figures.num_deaths == 0
    record = bench.controller.workers["worker-1"]
    if restarts:
        bench.up()
        assert record.incarnation == 2
        assert set(bench.replicas().values()) == {replicas}
        bench.check()
    else:
        bench.run_for(100.0)
        assert record.state is WorkerState.STOPPED
        assert [m.worker_id for m in bench.controller.view.routers()] == ["worker-0", "worker-2"]


def test_worker_with_layers_that_nobody_else_has_restarts_but_does_not_leave() -> None:
    bench = cut_by_layers().start().up()
    leaving = bench.controller.drain("worker-1")
    bench.run_until(lambda: leaving.is_done)
    with pytest.raises(PlacementError, match="layers of attention"):
        leaving.result()
    task = bench.controller.drain("worker-1", restarts=True)
    bench.run_until(lambda: task.is_done)
    task.result()
    bench.up()
    assert bench.controller.workers["worker-1"].incarnation == 2
    bench.check()


def test_worker_whose_experts_fit_nowhere_else_is_not_drained() -> None:
    # Each holds its 4 experts of 8, and has room for one more.
    bench = Bench(2, replicas=1, memory_bytes=20 + 50).start().up()
    task = bench.controller.drain("worker-1", restarts=True)
    bench.run_until(lambda: task.is_done)
    with pytest.raises(PlacementError, match="memory for the experts of worker-1"):
        task.result()
    assert bench.is_up()
    bench.check()


def test_last_worker_is_not_drained() -> None:
    bench = Bench(1, replicas=1).start().up()
    for worker_id in ("worker-0", "worker-7"):
        task = bench.controller.drain(worker_id)
        bench.run_until(lambda task=task: task.is_done)
        assert isinstance(task.error, PlacementError)
    assert bench.is_up()


def test_workers_for_experts_only_stay_so_whatever_comes_and_goes() -> None:
    bench = Bench(3, experts_only=1).start().up()

    def layers() -> dict[str, int]:
        members = bench.controller.view.members.values()
        return {member.worker_id: member.num_layers for member in members}

    whole = MODEL.num_layers
    assert layers() == {"worker-0": 0, "worker-1": whole, "worker-2": whole}
    assert sorted(bench.controller.view.chains) == ["worker-1", "worker-2"]
    change(bench, bench.controller.scale(4))
    assert layers() == {"worker-0": 0} | {f"worker-{n}": whole for n in (1, 2, 3)}
    bench.fleet.kill("worker-0")
    bench.run_for(0.0)
    bench.run_until(bench.is_up)
    change(bench, bench.controller.scale(2))
    assert layers() == {"worker-0": 0, "worker-1": whole}
    # Experts alone make no token.
    for ask in (lambda: bench.controller.scale(1), lambda: bench.controller.drain("worker-1")):
        task = ask()
        bench.run_until(lambda task=task: task.is_done)
        with pytest.raises(PlacementError, match="no other worker holds attention: worker-1"):
            task.result()
    assert bench.is_up()
    bench.check()


@pytest.mark.parametrize("restarts", [False, True])
# While the others load, while it hands its requests over, and while it starts again.
@pytest.mark.parametrize("dies_after_s", [0.5, LOAD_S + 0.2, LOAD_S - 0.5])
def test_worker_that_dies_while_it_is_drained_is_dead_and_not_asked_again(
    dies_after_s: float, restarts: bool
) -> None:
    bench = Bench(3, replicas=1).start().up()
    task = bench.controller.drain("worker-1", restarts=restarts)
    bench.run_for(dies_after_s)
    bench.fleet.kill("worker-1")
    bench.run_for(0.0)
    assert not bench.controller.view.members["worker-1"].can_compute
    bench.run_until(lambda: task.is_done)
    task.result()
    record = bench.controller.workers["worker-1"]
    if restarts:
        bench.up()
        assert record.incarnation == 2
        assert set(bench.replicas().values()) == {1}
        bench.check()
    else:
        bench.run_for(100.0)
        assert record.state is WorkerState.STOPPED
        assert bench.controller.is_complete
