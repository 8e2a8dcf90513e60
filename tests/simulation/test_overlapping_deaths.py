"""Two or three deaths, each before the last one was repaired: same tokens.

By default: schedules of fixed seeds in each cell of the kill matrix, and deaths of the controller
with a worker. The slow tests try all pairs of moments that are close together.
"""

from random import Random

import pytest

from tests.simulation.kill_matrix import (
    CONTROLLER,
    INGRESS,
    LED_SHAPES,
    MODES,
    SHAPES,
    Blows,
    Cell,
    Shape,
)

NUM_PAIRS = 8
NUM_TRIPLES = 6
# At most this many messages lie between two deaths. A process restarts within about that many.
WITHIN = 30
STRIDE = 4


def sample(cell: Cell, num_deaths: int, count: int) -> list[Blows]:
    """Random schedules of deaths close together, some at the same moment."""
    random = Random(f"{cell.shape} {cell.mode} {num_deaths}")
    schedules: list[Blows] = []
    for _ in range(count):
        n = random.randint(1, cell.num_messages)
        blows = [(n, random.choice([*cell.kinds]))]
        while len(blows) < num_deaths:
            n += random.choice((0, random.randint(1, WITHIN)))
            blows.append((n, random.choice([*cell.kinds])))
        schedules.append(tuple(blows))
    return schedules


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", (*SHAPES, *LED_SHAPES), ids=str)
def test_two_or_three_deaths_cost_no_token(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    for blows in (*sample(cell, 2, NUM_PAIRS), *sample(cell, 3, NUM_TRIPLES)):
        cell.run(blows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", LED_SHAPES, ids=str)
def test_deaths_of_controller_and_worker_together_cost_no_token(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    workers = [name for name in cell.kinds if name != CONTROLLER]
    offset = [*MODES].index(mode) % STRIDE
    for n in range(1 + offset, cell.num_messages + 1, STRIDE):
        name = workers[n // STRIDE % len(workers)]
        # Both at once, and each before the other.
        later = n + 1 + n % WITHIN
        cell.run(((n, CONTROLLER), (n, name)))
        cell.run(((n, CONTROLLER), (later, name)))
        cell.run(((n, name), (later, CONTROLLER)))
        # Now only the workers know the last view.
        cell.run(((n, CONTROLLER), (n, INGRESS), (later, name)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", (*SHAPES, *LED_SHAPES), ids=str)
def test_any_two_deaths_close_together_cost_no_token(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    names = [*cell.kinds]
    for first in range(1, cell.num_messages + 1, 5):
        for second in range(first, first + 60, 12):
            for i, name in enumerate(names):
                cell.run(((first, name), (second, names[(i + second) % len(names)])))
