"""Random clusters without faults: same tokens for any placement, load and timing.

To repeat a failing seed: `pytest tests/simulation -k seed-17-`, or
`python -m tests.simulation.replay --seed 17`, which prints what happened.
"""

import pytest

from tests.simulation.cluster import Simulation
from tests.simulation.scenario import random_scenario


@pytest.mark.parametrize("seed", range(200), ids=lambda seed: f"seed-{seed}-calm")
def test_every_stream_is_that_of_one_process(seed: int) -> None:
    Simulation(random_scenario(seed)).run()
