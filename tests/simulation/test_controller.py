"""The real controller over simulated processes: it starts, loses workers, grows and shrinks.

To repeat a failing seed: `pytest tests/simulation -k seed-17-led`, or
`python -m tests.simulation.replay --controlled --seed 17 --faults 4`, which prints what happened.
"""

import pytest

from tests.simulation.controlled import ControlledSimulation
from tests.simulation.scenario import random_controlled_scenario, with_bad_disks

MAX_FAULTS = 4


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed-{seed}-led")
def test_faults_and_scalings_cost_no_token(seed: int) -> None:
    ControlledSimulation(random_controlled_scenario(seed, MAX_FAULTS)).run()


@pytest.mark.parametrize(("seed", "num_faults"), [(428, 0), (148, 6)])
def test_experts_that_are_being_loaded_are_not_unloaded(seed: int, num_faults: int) -> None:
    """Seeds in which a placement was trimmed while workers loaded for the next."""
    ControlledSimulation(random_controlled_scenario(seed, num_faults)).run()


def test_a_cluster_can_shrink_while_a_removed_worker_restarts() -> None:
    # In this seed a worker dies, and loads again when the new placement no longer names it.
    ControlledSimulation(random_controlled_scenario(2005, MAX_FAULTS)).run()


@pytest.mark.parametrize("seed", range(60), ids=lambda seed: f"seed-{seed}-disk")
def test_files_that_change_or_come_back_late_cost_no_token(seed: int) -> None:
    """A worker that computed with other bytes would give other tokens."""
    ControlledSimulation(with_bad_disks(random_controlled_scenario(seed, 6))).run()
