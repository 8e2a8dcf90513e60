"""Which generation serves, which one ends, and when a new one is given up."""

import pytest

from milliways.cluster.control.fleet import LoadFailedError, Spawned
from milliways.cluster.control.generations import FORGET_AFTER_S, UNHEARD_S, Generations, hopeless
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.errors import PlacementError

SOON_S, LATE_S = FORGET_AFTER_S - 1.0, FORGET_AFTER_S + 1.0
SPAWNED = Spawned(address="", router_address="", node_id="", pid=1, memory_bytes=1)


def generations(*numbers: int) -> Generations:
    made = Generations()
    for number in numbers:
        made.add(number, 0.0)
    return made


def test_a_new_generation_serves_when_an_ingress_follows_it() -> None:
    both = generations(1, 2)
    both.follow(1, "old", 0.0)
    assert (both.serving(0.0), both.others(0.0)) == (1, (2,))
    both.follow(2, "new", 1.0)
    assert (both.serving(1.0), both.others(1.0)) == (2, (1,))
    both.unfollow("old")
    both.remove(1)
    assert (both.numbers, both.next_number) == ((2,), 3)


def test_the_old_generation_ends_when_its_last_replica_has_left() -> None:
    both = generations(1, 2)
    for follower_id in ("a", "b"):
        both.follow(1, follower_id, LATE_S)
    both.follow(2, "c", LATE_S)
    both.unfollow("a")
    assert both.due(LATE_S) == []
    both.unfollow("b")
    assert both.due(LATE_S) == [1]


def test_a_replica_that_died_is_forgotten_after_a_while() -> None:
    both = generations(1, 2)
    both.follow(1, "killed", 0.0)
    for now_s in (0.0, SOON_S, LATE_S):
        both.follow(2, "alive", now_s)
        assert both.due(now_s) == ([1] if now_s is LATE_S else [])


def test_a_new_generation_ends_if_nobody_wants_it_any_more() -> None:
    both = generations(1, 2)
    both.want(2, SOON_S)
    both.follow(1, "old", SOON_S + SOON_S)
    assert both.due(SOON_S + SOON_S) == []
    both.follow(1, "old", SOON_S + LATE_S)
    assert both.due(SOON_S + LATE_S) == [2]


def test_the_old_generation_serves_again_if_the_change_is_undone() -> None:
    both = generations(1, 2)
    both.follow(1, "old", LATE_S)
    both.follow(2, "new", LATE_S)
    both.follow(1, "newer", LATE_S)
    both.unfollow("new")
    assert both.serving(LATE_S) == 1
    assert both.due(LATE_S) == [2]


def test_replicas_with_older_settings_are_named_while_they_are_heard() -> None:
    one = generations(1)
    declared = {"ingress.grace_s": 9.0, "workers.count": 3}
    one.follow(1, "new", 0.0, {"ingress.grace_s": 9.0, "workers.count": 2})
    one.follow(1, "old", 0.0, {"ingress.grace_s": 5.0, "workers.count": 3})
    assert one.outdated_followers(1, declared, 0.0) == ("old",)
    assert one.outdated_followers(1, declared, LATE_S) == ()
    one.unfollow("old")
    assert one.outdated_followers(1, declared, 0.0) == ()


def test_nothing_ends_while_nobody_says_what_it_follows() -> None:
    """As when a controller starts, or when all ingresses died at once."""
    both = generations(1, 2)
    assert both.due(LATE_S) == []
    both.follow(2, "back", LATE_S)
    assert (both.due(LATE_S), both.serving(LATE_S)) == ([1], 2)


def test_a_controller_that_starts_waits_for_followers_that_it_has_not_heard_yet() -> None:
    both = Generations()
    for number in (1, 2):
        both.add(number, 0.0, was_found=True)
    both.follow(2, "new", 1.0)
    both.follow(1, "first of two", 1.0)
    both.unfollow("first of two")
    assert both.due(UNHEARD_S - 1.0) == []
    both.follow(2, "new", LATE_S)
    assert both.due(LATE_S) == [1]


def test_the_generation_that_serves_never_ends() -> None:
    one = generations(1)
    one.follow(1, "killed", 0.0)
    assert one.due(LATE_S) == []
    with pytest.raises(AssertionError):
        one.remove(1)


def test_a_replica_follows_one_generation() -> None:
    both = generations(1, 2)
    both.follow(1, "a", 0.0)
    both.follow(2, "a", 0.0)
    assert not both.is_followed(1, 0.0)


def record(worker_id: str = "worker-0", *, has_process: bool = True) -> WorkerRecord:
    return WorkerRecord(worker_id, spawned=SPAWNED if has_process else None)


def test_a_generation_whose_files_cannot_be_read_is_given_up() -> None:
    worker = record()
    for _ in range(2):
        worker.note_failed_load(LoadFailedError("worker-0 cannot load: /m: is missing"))
        assert hopeless([worker], None, 0.0, 10.0, 10.0) == ""
    worker.note_failed_load(LoadFailedError("worker-0 cannot load: /m: is missing"))
    assert hopeless([worker], None, 0.0, 10.0, 10.0) == "worker-0 cannot load: /m: is missing"


def test_a_generation_whose_workers_die_or_do_not_fit_is_given_up() -> None:
    worker = record()
    worker.num_quick_deaths = 3
    assert hopeless([worker], None, 0.0, 10.0, 10.0) == "worker-0 dies again and again"
    assert hopeless([record()], PlacementError("1 GB short"), 0.0, 10.0, 10.0) == "1 GB short"


def test_a_generation_that_takes_too_long_is_given_up() -> None:
    waiting = record("worker-1", has_process=False)
    waiting.waits_for = "a node with 1 GPU"
    assert hopeless([record(), waiting], None, 9.0, 10.0, 10.0) == ""
    late = hopeless([record(), waiting], None, 11.0, 10.0, 10.0)
    assert late.startswith("it is not complete within 10 s: ")
    assert late.endswith("worker-1 waits for a node with 1 GPU")
    # Once all have a process, they may load.
    assert hopeless([record()], None, 19.0, 10.0, 10.0) == ""
    assert hopeless([record()], None, 21.0, 10.0, 10.0) != ""
