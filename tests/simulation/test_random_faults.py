"""Random clusters with one or several faults: same tokens.

To repeat a failing seed: `pytest tests/simulation -k seed-17-struck`, or
`python -m tests.simulation.replay --seed 17 --faults 4`, which prints what happened.
"""

import pytest

from tests.simulation.cluster import Simulation
from tests.simulation.scenario import random_scenario

MAX_FAULTS = 4


@pytest.mark.parametrize("seed", range(200), ids=lambda seed: f"seed-{seed}-struck")
def test_faults_cost_no_token(seed: int) -> None:
    Simulation(random_scenario(seed, MAX_FAULTS)).run()


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(100, 150), ids=lambda hundred: f"seeds-{hundred}00")
def test_many_faults_cost_no_token(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        try:
            Simulation(random_scenario(seed, 3 * MAX_FAULTS)).run()
        except BaseException as error:
            error.add_note(f"seed {seed}, --faults {3 * MAX_FAULTS}")
            raise
