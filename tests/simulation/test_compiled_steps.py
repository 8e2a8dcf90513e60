"""Deaths and other faults inside the exchanges of compiled steps: same tokens.

A call over a ring and its answer are messages of a run (`tests/memory_exchange.py`). So processes
die before a call is seen, between the answers of two workers, while the router has missing rows
computed elsewhere, and while it tries again.
"""

import dataclasses
from random import Random

import pytest

from tests.simulation.cluster import Simulation
from tests.simulation.kill_matrix import (
    COMPILED_SHAPES,
    MODES,
    Blow,
    Blows,
    Cell,
    Shape,
    single_blows,
)
from tests.simulation.scenario import random_scenario

# By default only every n-th moment; victims and modes start at different ones.
STRIDE = 11
NUM_PAIRS = 4
# Messages between two deaths: the second one falls into what the first one made necessary.
WITHIN = 8
MAX_FAULTS = 4
EVERY = pytest.param(1, marks=pytest.mark.slow, id="every")


@pytest.mark.parametrize("stride", [pytest.param(STRIDE, id="some"), EVERY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", COMPILED_SHAPES, ids=str)
def test_a_fault_at_any_message_costs_no_token(shape: Shape, mode: str, stride: int) -> None:
    cell = Cell(shape, mode)
    for blows in single_blows(cell, stride=stride):
        simulation = cell.run(blows)
        assert simulation.supervisor.num_deaths == 1, f"no process died: {cell.command(blows)}"
    others = (Blow.REPLACE_FROZEN, *((Blow.RACE_FROZEN,) if shape.num_routers > 1 else ()))
    for blow in others:
        for blows in single_blows(cell, blow, 2 * stride):
            cell.run(blows, blow)


@pytest.mark.parametrize("mode", ["greedy", "n-3", "together"])
@pytest.mark.parametrize("shape", COMPILED_SHAPES, ids=str)
def test_two_deaths_within_one_layer_cost_no_token(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    random = Random(f"{shape} {mode}")
    for _ in range(NUM_PAIRS):
        first = random.randint(1, cell.num_messages)
        second = first + random.randint(0, WITHIN)
        names = random.choices([*cell.kinds], k=2)
        cell.run(((first, names[0]), (second, names[1])))


@pytest.mark.parametrize("seed", range(20), ids=lambda seed: f"seed-{seed}-compiled")
def test_random_faults_cost_no_token(seed: int) -> None:
    scenario = random_scenario(seed, MAX_FAULTS)
    settings = dataclasses.replace(
        scenario.settings, has_direct_links=True, has_exchange=True, kv_standby=False
    )
    Simulation(dataclasses.replace(scenario, settings=settings)).run()


def test_rows_travel_inside_steps_and_deaths_are_left_to_the_router() -> None:
    """What the other tests rely on: calls go another way after a death, and not without one."""
    cell = Cell(COMPILED_SHAPES[1], "greedy")

    def completed(blows: Blows) -> int:
        """Layers that the router completed. Of the first step, links may still be opening."""
        processes = cell.run(blows).cluster.processes
        nodes = [process.node for process in processes if process.node is not None]
        assert sum(node.num_asked for node in nodes) > 0
        return sum(node.num_missing for node in nodes)

    assert completed(()) <= 1
    assert max(completed(blows) for blows in single_blows(cell, stride=5)) > 1
