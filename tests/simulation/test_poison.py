"""A request that kills workers fails; it kills few of them, and no other request fails."""

import numpy as np
import pytest

from milliways.cluster.control.planner import AttentionCut
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SamplingParams
from milliways.router.limits import DispatchLimits
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.wire.calls import RunExperts
from milliways.wire.errors import PoisonedRequestError
from tests.memory_cluster import ClusterSettings
from tests.recording import Recording
from tests.simulation.cluster import Simulation
from tests.simulation.fake_model import expected_streams, fake_config
from tests.simulation.scenario import Scenario, make_view

CONFIG = fake_config(num_layers=3)
POISON = 13
# The row of POISON at position 0, before the experts of layer 0: twice its embedding.
POISON_ROW = (2 * (7 * POISON + 1), 2 * (POISON + 2))


def is_deadly(call: RunExperts) -> bool:
    return call.layer == 0 and bool(np.all(call.rows_TD == POISON_ROW, axis=1).any())


def run(
    requests: list[GenerationRequest],
    replicas: int,
    num_routers: int = 1,
    seed: int = 1,
    compute_s: float = 0.0,
) -> tuple[Simulation, list[Recording]]:
    """Runs requests spread over routers, each in a process of its own."""
    view = make_view(
        CONFIG,
        num_workers=8,
        replicas=replicas,
        cut=AttentionCut.REPLICATED,
        num_routers=num_routers,
    )
    simulation = Simulation(
        Scenario(
            seed=seed,
            config=CONFIG,
            view=view,
            compute_s=compute_s,
            settings=ClusterSettings(
                cache_size=CacheSize(num_blocks=64, block_size=2, max_slots=8),
                dispatch=DispatchLimits(hedge_after_s=0.5, timeout_s=5.0),
                has_direct_links=False,
            ),
        )
    )
    simulation.is_deadly = is_deadly
    recordings = [
        simulation.cluster.submit(
            f"w{i % num_routers}",
            f"r{i}",
            RoutedRequest(request_id=f"r{i}", request=request, timeout_s=900.0),
        )
        for i, request in enumerate(requests)
    ]
    simulation.cluster.run_until(lambda: all(one.has_ended for one in recordings), 900.0)
    return simulation, recordings


def request(*prompt_ids: int, max_tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prompt_ids, max_tokens=max_tokens, sampling=SamplingParams(temperature=0.0)
    )


def finish(simulation: Simulation) -> None:
    simulation.cluster.settle()
    simulation.supervisor.close()
    simulation.cluster.settle()
    simulation.cluster.close()


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("num_others", [0, 1, 5])
def test_only_the_poisoned_request_fails(num_others: int, replicas: int) -> None:
    others = [request(20 + i, 3, 7 + i) for i in range(num_others)]
    simulation, recordings = run([*others, request(POISON, 5)], replicas)
    assert isinstance(recordings[-1].error, PoisonedRequestError)
    for recording, its_request in zip(recordings[:-1], others, strict=True):
        assert recording.error is None
        (expected,) = expected_streams(its_request, CONFIG)
        assert [e.token_id for e in recording.events] == [t.token_id for t in expected.tokens]
    # Some die while the request runs in a batch, since a layer goes to several workers at once.
    # After that the request runs alone, and each attempt costs one.
    assert simulation.supervisor.num_deaths <= 6
    finish(simulation)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_request_of_another_router_at_the_same_workers_does_not_fail(
    replicas: int, seed: int
) -> None:
    others = [request(20 + i, 3, 7 + i, max_tokens=40) for i in range(8)]
    simulation, recordings = run(
        [*others, request(POISON, 5)], replicas, num_routers=3, seed=seed, compute_s=0.02
    )
    assert isinstance(recordings[-1].error, PoisonedRequestError)
    for recording, its_request in zip(recordings[:-1], others, strict=True):
        assert recording.error is None
        (expected,) = expected_streams(its_request, CONFIG)
        assert [e.token_id for e in recording.events] == [t.token_id for t in expected.tokens]
    finish(simulation)


def test_workers_that_die_with_the_same_rows_by_chance_fail_nothing() -> None:
    simulation, _ = run([], 3)
    num_left = 3

    def is_bad_luck(call: RunExperts) -> bool:
        nonlocal num_left
        is_hit = is_deadly(call) and num_left > 0
        num_left -= is_hit
        return is_hit

    simulation.is_deadly = is_bad_luck
    unlucky = request(POISON, 5)
    routed = RoutedRequest(request_id="r", request=unlucky, timeout_s=900.0)
    recording = simulation.cluster.submit("w0", "r", routed)
    simulation.cluster.run_until(lambda: recording.has_ended, 900.0)
    assert num_left == 0
    assert recording.error is None
    (expected,) = expected_streams(unlucky, CONFIG)
    assert [e.token_id for e in recording.events] == [t.token_id for t in expected.tokens]
    finish(simulation)
