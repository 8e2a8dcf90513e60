"""Two and three deaths, the next before the last was made good: same tokens.

By default a sample of fixed seeds in each cell of the kill matrix, and the controller together with
a worker; all pairs of moments near one another take minutes.
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
# So many messages lie between two deaths at most: those who die come back within about as many.
WITHIN = 30
STRIDE = 4


def sample(cell: Cell, num_deaths: int, count: int) -> list[Blows]:
    """Deaths in a row, of anybody, some at one moment."""
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
def test_no_two_and_no_three_deaths_cost_a_token(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    for blows in (*sample(cell, 2, NUM_PAIRS), *sample(cell, 3, NUM_TRIPLES)):
        cell.run(blows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", LED_SHAPES, ids=str)
def test_no_death_of_the_controller_with_a_worker_costs_a_token(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    workers = [name for name in cell.kinds if name != CONTROLLER]
    offset = [*MODES].index(mode) % STRIDE
    for n in range(1 + offset, cell.num_messages + 1, STRIDE):
        name = workers[n // STRIDE % len(workers)]
        # At once, and each before the other.
        later = n + 1 + n % WITHIN
        cell.run(((n, CONTROLLER), (n, name)))
        cell.run(((n, CONTROLLER), (later, name)))
        cell.run(((n, name), (later, CONTROLLER)))
        # Only the workers know the last view then.
        cell.run(((n, CONTROLLER), (n, INGRESS), (later, name)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", (*SHAPES, *LED_SHAPES), ids=str)
def test_no_pair_of_deaths_near_one_another_costs_a_token(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    names = [*cell.kinds]
    for first in range(1, cell.num_messages + 1, 5):
        for second in range(first, first + 60, 12):
            for i, name in enumerate(names):
                cell.run(((first, name), (second, names[(i + second) % len(names)])))
