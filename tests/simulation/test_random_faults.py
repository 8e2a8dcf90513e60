"""Random clusters in which things go wrong, one and several at a time: same tokens.

A seed that fails is run again with `pytest tests/simulation -k seed-17-struck`, or with
`python -m tests.simulation.replay --seed 17 --faults 4`, which tells what happened.
"""

import pytest

from tests.simulation.cluster import Simulation
from tests.simulation.scenario import random_scenario

MAX_FAULTS = 4


@pytest.mark.parametrize("seed", range(200), ids=lambda seed: f"seed-{seed}-struck")
def test_no_fault_costs_a_token(seed: int) -> None:
    Simulation(random_scenario(seed, MAX_FAULTS)).run()


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(100, 150), ids=lambda hundred: f"seeds-{hundred}00")
def test_no_storm_of_faults_costs_a_token(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        try:
            Simulation(random_scenario(seed, 3 * MAX_FAULTS)).run()
        except BaseException as error:
            error.add_note(f"seed {seed}, --faults {3 * MAX_FAULTS}")
            raise
