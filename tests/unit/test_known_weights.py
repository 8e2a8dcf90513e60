"""The controller and disks that cannot be read, or have other bytes than the served model."""

from collections.abc import Sequence
from pathlib import Path

from milliways.cluster.control.controller import Controller
from milliways.cluster.control.deaths import RELOAD_S_MAX, UNREADABLE_S
from milliways.cluster.control.fleet import Existing
from milliways.model.manifest import Manifest
from milliways.model.small_files import SmallFiles
from milliways.wire.view import EMPTY_VIEW, WorkerState
from tests.fake_fleet import LOAD_S, MODEL, RIGHT, SPAWN_S, WRONG, Bench

MISSING = "/m/tensor00007_000: is missing"


def test_the_first_load_decides_and_everybody_learns_of_it() -> None:
    bench = Bench(3).start().up()
    manifest = bench.controller.view.manifest
    assert set(manifest.digests.values()) == {RIGHT}
    assert len(manifest) == MODEL.num_layers * MODEL.num_experts
    assert bench.controller.view.manifest_is_whole
    assert all(worker.views[-1].manifest == manifest for worker in bench.fleet.all_workers)


def test_a_worker_that_cannot_read_says_why_and_tries_again_in_its_process() -> None:
    bench = Bench(3).start().up()
    bench.fleet.unreadable.add("worker-1")
    bench.fleet.kill("worker-1")
    bench.run_for(100.0)
    record = bench.controller.workers["worker-1"]
    assert record.state is WorkerState.LOADING
    assert MISSING in record.last_error and "worker-1" in record.last_error
    waits = ("its shards to be loaded", f"its next try to load, in {RELOAD_S_MAX:g} s")
    assert bench.controller.waits_for(record) in waits
    assert record.incarnation == 2
    bench.fleet.unreadable.clear()
    assert bench.run_until(bench.is_up) <= RELOAD_S_MAX + LOAD_S
    assert record.last_error == "" and record.incarnation == 2
    bench.up().check()


def test_other_bytes_never_join() -> None:
    bench = Bench(3).start().up()
    bench.fleet.contents["worker-1"] = WRONG
    bench.fleet.kill("worker-1")
    bench.run_for(100.0)
    record = bench.controller.workers["worker-1"]
    assert record.state is WorkerState.LOADING and "is another" in record.last_error
    assert set(bench.controller.view.manifest.digests.values()) == {RIGHT}
    bench.fleet.contents.clear()
    bench.up().check()


def test_all_dead_and_all_disks_changed_is_an_outage_and_no_other_model() -> None:
    bench = Bench(2).start().up()
    bench.fleet.contents = {"worker-0": WRONG, "worker-1": WRONG}
    bench.fleet.kill("worker-0")
    bench.fleet.kill("worker-1")
    bench.run_for(100.0)
    assert not bench.controller.is_complete and not bench.controller.view.routers()
    bench.fleet.contents.clear()
    bench.up().check()


def test_survivors_try_again_to_take_over() -> None:
    bench = Bench(3, replicas=1).start().up()
    bench.fleet.unreadable = {"worker-0", "worker-1", "worker-2"}
    bench.fleet.without_node.add("worker-1")
    bench.fleet.kill("worker-1")
    bench.run_for(60.0)
    assert not bench.controller.is_complete
    for name in ("worker-0", "worker-2"):
        record = bench.controller.workers[name]
        assert record.state is WorkerState.READY and MISSING in record.last_error
        assert "to take experts over" in bench.controller.waits_for(record)
    bench.fleet.unreadable.clear()
    bench.run_until(lambda: bench.controller.is_complete, RELOAD_S_MAX + LOAD_S + 1.0)
    bench.run_for(RELOAD_S_MAX)
    for name in ("worker-0", "worker-2"):
        record = bench.controller.workers[name]
        assert (record.last_error, bench.controller.waits_for(record)) == ("", "")


def test_two_disks_that_differ_at_the_start_give_one_model() -> None:
    bench = Bench(2)
    bench.fleet.contents["worker-1"] = WRONG
    bench.start().run_for(60.0)
    # Both loaded at the same time; who answered first is right.
    states = [record.state for record in bench.controller.workers.values()]
    assert states == [WorkerState.READY, WorkerState.LOADING]
    assert "other bytes than other workers" in bench.controller.workers["worker-1"].last_error or (
        "is another" in bench.controller.workers["worker-1"].last_error
    )
    bench.fleet.contents.clear()
    bench.up().check()
    assert set(bench.controller.view.manifest.digests.values()) == {RIGHT}


def test_a_pinned_manifest_refuses_a_bad_disk_at_the_first_start() -> None:
    bench = Bench(2)
    names = [f"expert {layer}.{e}" for layer in range(2) for e in range(4)]
    pinned = Manifest(dict.fromkeys(names, RIGHT))
    bench.controller = Controller(
        MODEL, bench.controller._state.settings, bench.fleet, bench.tasks, pinned
    )
    bench.fleet.contents = {"worker-0": WRONG}
    bench.start().run_for(60.0)
    assert bench.controller.workers["worker-0"].state is WorkerState.LOADING
    assert bench.controller.workers["worker-1"].state is WorkerState.READY


def existing_of(bench: Bench) -> Sequence[Existing]:
    """What the workers of a bench would tell a new controller."""
    found: list[Existing] = []
    for record in bench.controller.workers.values():
        worker = bench.fleet.now[record.worker_id]
        assert record.spawned is not None and worker.shards is not None
        if worker.is_alive:
            found.append(
                Existing(
                    worker_id=record.worker_id,
                    incarnation=record.incarnation,
                    spawned=record.spawned,
                    shards=worker.shards,
                    held=worker.held,
                    view=worker.views[-1],
                    manifest=worker.found,
                    small_files=bench.fleet.small_files,
                )
            )
    return found


def test_a_new_controller_learns_the_model_from_the_workers_that_are_left() -> None:
    bench = Bench(3).start().up()
    manifest = bench.controller.view.manifest
    bench.controller.close()
    bench.fleet.kill("worker-1")
    bench.fleet.kill("worker-2")
    existing = existing_of(bench)
    assert [found.worker_id for found in existing] == ["worker-0"]
    again = Controller(MODEL, bench.controller._state.settings, bench.fleet, bench.tasks)
    bench.controller = again
    bench.fleet.contents = {"worker-1": WRONG, "worker-2": WRONG}
    bench.start(existing).run_for(60.0)
    assert again.view.manifest == manifest and again.view.manifest_is_whole
    assert again.workers["worker-1"].state is WorkerState.LOADING
    bench.fleet.contents.clear()
    bench.up().check()


def test_a_new_controller_learns_the_model_from_the_view_of_an_ingress() -> None:
    bench = Bench(2).start().up()
    known = bench.controller.view
    bench.controller.close()
    bench.fleet.kill("worker-0")
    bench.fleet.kill("worker-1")
    again = Controller(MODEL, bench.controller._state.settings, bench.fleet, bench.tasks)
    bench.fleet.contents = {"worker-0": WRONG, "worker-1": WRONG}
    bench.controller = again
    again.start((), known)
    bench.run_for(60.0)
    assert not again.view.routers()
    assert known != EMPTY_VIEW and again.view.manifest == known.manifest


def test_scaling_goes_on_when_a_file_comes_back() -> None:
    bench = Bench(3, replicas=2).start().up()
    bench.fleet.unreadable = {"worker-0", "worker-1", "worker-2"}
    change = bench.controller.scale(2)
    bench.run_for(60.0)
    assert not change.is_done and len(bench.controller.view.routers()) == 3
    bench.fleet.unreadable.clear()
    bench.run_until(lambda: change.is_done, RELOAD_S_MAX + LOAD_S + SPAWN_S + 5.0)
    change.result()
    bench.up().check()


def test_a_process_that_cannot_even_start_is_started_again_soon() -> None:
    assert UNREADABLE_S + SPAWN_S < 20.0
    bench = Bench(3).start().up()
    bench.fleet.cannot_start.add("worker-1")
    bench.fleet.kill("worker-1")
    bench.run_for(300.0)
    record = bench.controller.workers["worker-1"]
    assert "config.json" in record.last_error
    bench.fleet.cannot_start.clear()
    assert bench.run_until(bench.is_up) <= UNREADABLE_S + SPAWN_S + LOAD_S


SMALL_FILES = SmallFiles(Path("/m"), Path("/m/ckpt-0"), {"config.json": b"{}"})


def test_a_process_that_cannot_read_its_configuration_starts_with_that_of_others() -> None:
    bench = Bench(3)
    bench.fleet.small_files = SMALL_FILES
    bench.start().up()
    bench.fleet.cannot_start.add("worker-1")
    bench.fleet.kill("worker-1")
    bench.up().check()
    assert bench.controller.workers["worker-1"].incarnation == 2


def test_a_new_controller_learns_the_configuration_from_the_workers_that_are_left() -> None:
    bench = Bench(3)
    bench.fleet.small_files = SMALL_FILES
    bench.start().up()
    bench.controller.close()
    bench.fleet.kill("worker-1")
    bench.fleet.cannot_start = {"worker-0", "worker-1", "worker-2"}
    existing = existing_of(bench)
    again = Controller(MODEL, bench.controller._state.settings, bench.fleet, bench.tasks)
    bench.controller = again
    bench.start(existing).up().check()
