"""Requests go where there is room, however many ingress replicas decide it.

Replicas of 1, 2 and 4 get the same requests at the same times: short ones, long ones, and some with
up to 64 samples. How long the slowest hundredth waits for the first token must not depend on the
number of replicas.
"""

from collections.abc import Callable
from functools import cache
from random import Random

import pytest

from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.request import GenerationRequest
from tests.simulation.fake_model import fake_config
from tests.simulation.replicas import Ask, Replica, SharedRouters, mixed_asks, percentile

NUM_ROUTERS = 4
SEEDS = range(4)
NUM_ASKS = 500
ASKS_PER_S = 20.0
# A request of the slowest hundredth may wait this much longer than with one replica.
ALLOWED = 1.1


def run(seed: int, prepare: Callable[[SharedRouters], None]) -> list[Ask]:
    """The requests of a seed, each with how long it waited."""
    asks = mixed_asks(Random(f"asks {seed}"), NUM_ASKS, ASKS_PER_S)
    cluster = SharedRouters(
        fake_config(1, sequence_len=1024), num_routers=NUM_ROUTERS, seed=f"{seed}"
    )
    prepare(cluster)
    cluster.run(asks, Random(f"replica of {seed}"))
    return asks


@cache
def asks_with(num_replicas: int) -> list[Ask]:
    """The requests of all seeds."""

    def prepare(cluster: SharedRouters) -> None:
        for _ in range(num_replicas):
            cluster.join()

    return [ask for seed in SEEDS for ask in run(seed, prepare)]


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_slowest_hundredth_waits_as_with_one_replica(num_replicas: int) -> None:
    alone_s = percentile(asks_with(1), 0.99)
    together_s = percentile(asks_with(num_replicas), 0.99)
    assert together_s <= ALLOWED * alone_s


def test_slowest_hundredth_would_wait_for_long_without_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Replica, "hear", lambda *_: None)
    alone_s = percentile(asks_with(1), 0.99)
    blind_s = percentile(asks_with.__wrapped__(4), 0.99)
    assert blind_s > 1.5 * alone_s


def test_nobody_waits_longer_while_replicas_join() -> None:
    duration_s = NUM_ASKS / ASKS_PER_S

    def prepare(cluster: SharedRouters) -> None:
        cluster.join()
        for share in (0.25, 0.5, 0.75):
            cluster.tasks.call_at(share * duration_s, cluster.join)

    joined = [ask for seed in SEEDS for ask in run(seed, prepare)]
    alone_s, joined_s = percentile(asks_with(1), 0.99), percentile(joined, 0.99)
    assert joined_s <= ALLOWED * alone_s


def test_no_short_request_waits_behind_many_samples_of_another_replica() -> None:
    cluster = SharedRouters(fake_config(1, sequence_len=1024), num_routers=3, seed="samples")
    cluster.join()
    cluster.join()
    greedy = SamplingParams(temperature=0.0)
    many = GenerationRequest(prompt_ids=(5,), max_tokens=200, num_samples=64, sampling=greedy)
    few = GenerationRequest(prompt_ids=(6,), max_tokens=2, sampling=greedy)
    short = [Ask(few, arrives_s=0.5 + 0.1 * i) for i in range(16)]
    cluster.run([Ask(many, arrives_s=0.0), *short], Random(1))
    assert max(ask.waited_s for ask in short) < 0.1
