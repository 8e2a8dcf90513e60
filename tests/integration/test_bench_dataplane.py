"""The contestants of `milliways bench dataplane` start, answer, and end."""

import pytest

from milliways.benchmarks.speed.dataplane import CONTESTANTS, measure_hops


@pytest.mark.slow
def test_all_contestants_are_measured_in_turn() -> None:
    figures = measure_hops(num_rounds=2, calls_per_round=3, num_tokens=(1, 4))
    assert [hop.contestant for hop in figures.hops] == [*CONTESTANTS, *CONTESTANTS]
    assert all(len(hop.seconds) == 6 and hop.least_us > 0 for hop in figures.hops)
