"""Random clusters without faults: whatever the placement, the load and the timing, same tokens.

A seed that fails is run again with `pytest tests/simulation -k seed-17-`, or with
`python -m tests.simulation.replay --seed 17`, which tells what happened.
"""

import pytest

from tests.simulation.cluster import Simulation
from tests.simulation.scenario import random_scenario


@pytest.mark.parametrize("seed", range(200), ids=lambda seed: f"seed-{seed}-calm")
def test_every_stream_is_that_of_one_process(seed: int) -> None:
    Simulation(random_scenario(seed)).run()
