"""A worker's state changes along one table, in the controller's record and in the worker."""

from itertools import product

import pytest

from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.view import WORKER_MOVES, WorkerState
from milliways.workers.fence import WorkerFence

LOADING, READY, DRAINING, STOPPED, LOST = WorkerState
# Written out: this is the table, said a second time.
LEGAL = {
    (LOADING, READY),
    (LOADING, STOPPED),
    (LOADING, LOST),
    (READY, DRAINING),
    (READY, STOPPED),
    (READY, LOST),
    (DRAINING, STOPPED),
    (DRAINING, LOST),
    (LOST, LOADING),
    (LOST, STOPPED),
}
ON_THE_WAY = {LOADING: (), READY: (READY,), DRAINING: (READY, DRAINING)}
ON_THE_WAY |= {STOPPED: (STOPPED,), LOST: (LOST,)}


@pytest.mark.parametrize("holder", [WorkerRecord, WorkerFence])
@pytest.mark.parametrize(("state", "to"), list(product(WorkerState, WorkerState)))
def test_every_move_is_legal_or_refused(
    holder: type[WorkerRecord | WorkerFence], state: WorkerState, to: WorkerState
) -> None:
    worker = holder("worker-0", 1)
    for step in ON_THE_WAY[state]:
        worker.move(step)
    assert worker.state is state
    if (state, to) in LEGAL:
        worker.move(to)
        assert worker.state is to
    else:
        with pytest.raises(AssertionError, match=f"{state} -> {to}"):
            worker.move(to)
        assert worker.state is state


def test_the_table_names_every_state() -> None:
    assert set(WORKER_MOVES) == set(WorkerState)


def test_a_record_has_no_other_way_to_its_state() -> None:
    with pytest.raises(AttributeError):
        WorkerRecord("worker-0").state = READY  # pyright: ignore[reportAttributeAccessIssue]


def test_the_next_incarnation_of_a_lost_worker_loads() -> None:
    record = WorkerRecord("worker-0")
    record.begin_incarnation()
    assert (record.incarnation, record.state) == (1, LOADING)
    record.move(LOST)
    record.begin_incarnation()
    assert (record.incarnation, record.state) == (2, LOADING)
