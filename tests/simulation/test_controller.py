"""The real controller over simulated processes: it comes up, loses workers, grows and shrinks.

A seed that fails is run again with `pytest tests/simulation -k seed-17-led`, or with
`python -m tests.simulation.replay --controlled --seed 17 --faults 4`, which tells what happened.
"""

import pytest

from tests.simulation.controlled import ControlledSimulation
from tests.simulation.scenario import random_controlled_scenario

MAX_FAULTS = 4


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed-{seed}-led")
def test_no_fault_and_no_scaling_costs_a_token(seed: int) -> None:
    ControlledSimulation(random_controlled_scenario(seed, MAX_FAULTS)).run()


@pytest.mark.parametrize(("seed", "num_faults"), [(428, 0), (148, 6)])
def test_what_is_being_loaded_is_not_unloaded(seed: int, num_faults: int) -> None:
    """Seeds in which a placement was trimmed while workers loaded for the next."""
    ControlledSimulation(random_controlled_scenario(seed, num_faults)).run()


def test_a_cluster_may_shrink_while_a_worker_that_is_to_go_comes_back() -> None:
    # It dies, and is loading when the new placement no longer names it.
    ControlledSimulation(random_controlled_scenario(2005, MAX_FAULTS)).run()
