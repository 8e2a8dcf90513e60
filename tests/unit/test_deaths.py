"""How long a worker that died waits before it is started again."""

import pytest

from milliways.cluster.control.deaths import quick_deaths, restart_delay_s
from milliways.cluster.control.worker_record import WorkerRecord


@pytest.mark.parametrize(
    ("num_quick_deaths", "others_serve", "delay_s"),
    [
        (0, True, 1.0),
        (2, True, 1.0),
        (2, False, 0.0),
        (3, True, 2.0),
        (5, True, 8.0),
        (100, True, 30.0),
        (3, False, 2.0),
        (100, False, 2.0),
    ],
)
def test_pauses_grow_for_who_keeps_dying_but_not_while_nobody_serves(
    num_quick_deaths: int, others_serve: bool, delay_s: float
) -> None:
    record = WorkerRecord("worker-0", num_quick_deaths=num_quick_deaths)
    assert restart_delay_s(record, others_serve=others_serve) == delay_s


def test_who_came_up_well_starts_from_the_shortest_pause() -> None:
    record = WorkerRecord("worker-0", num_quick_deaths=5, ready_at_s=100.0)
    assert quick_deaths(record, 105.0) == 6
    assert quick_deaths(record, 111.0) == 0
    assert quick_deaths(WorkerRecord("worker-0", num_quick_deaths=5), 111.0) == 6
