"""The requests and the verdicts of the benchmark of several ingress replicas."""

from collections import Counter
from itertools import pairwise
from random import Random

from milliways.benchmarks.replicas import mixed_asks, table


def test_each_number_of_replicas_gets_the_same_mixed_requests() -> None:
    asks = mixed_asks(Random(1), 2000, rate=4.0)
    assert asks == mixed_asks(Random(1), 2000, rate=4.0)
    kinds = Counter((ask.max_tokens > 4, ask.num_samples > 1) for ask in asks)
    short, long, many = (kinds[kind] for kind in ((False, False), (True, False), (True, True)))
    assert short > 4 * long > 8 * many > 0
    assert all(late.at_s >= early.at_s for early, late in pairwise(asks))
    assert 400 < asks[-1].at_s < 600


def test_missed_aim_is_said() -> None:
    same = [0.001 * number for number in range(1, 101)]
    lines = table({1: same, 2: [1.05 * wait for wait in same], 4: [2 * wait for wait in same]})
    assert lines[2] == "| 1 | 50 | 90 | 99 |"
    assert lines[5].endswith("(aim: at most 1.1, reached)")
    assert lines[6] == "p99 with 4: 2.00 times that with 1 (aim: at most 1.1, missed)"
