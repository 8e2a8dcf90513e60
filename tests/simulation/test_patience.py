"""How long a router waits: as long as it must, and no longer."""

import dataclasses

import pytest

from milliways.cluster.control.planner import AttentionCut
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SamplingParams
from milliways.router.limits import DispatchLimits
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.wire.errors import RefusalReason
from milliways.wire.view import ClusterView
from tests.memory_cluster import ClusterSettings, Process
from tests.simulation.cluster import Simulation
from tests.simulation.fake_model import fake_config
from tests.simulation.scenario import Arrival, Scenario, make_view

CONFIG = fake_config(num_layers=4)
REQUEST = GenerationRequest(
    prompt_ids=(5, 3, 17, 40), max_tokens=6, sampling=SamplingParams(temperature=0.0)
)


def scenario(
    *,
    num_workers: int = 2,
    cut: AttentionCut = AttentionCut.REPLICATED,
    replicas: int = 1,
    has_direct_links: bool = True,
    dispatch: DispatchLimits | None = None,
) -> Scenario:
    """One request at the first of a few workers."""
    view = make_view(CONFIG, num_workers=num_workers, replicas=replicas, cut=cut, num_routers=1)
    return Scenario(
        seed=1,
        config=CONFIG,
        view=view,
        settings=ClusterSettings(
            cache_size=CacheSize(num_blocks=32, block_size=2, max_slots=4),
            dispatch=dispatch or DispatchLimits(hedge_after_s=0.05, timeout_s=1.0),
            has_direct_links=has_direct_links,
        ),
        arrivals=(Arrival(at_s=0.0, request=REQUEST),),
    )


def worker(simulation: Simulation, name: str) -> Process:
    return next(p for p in simulation.cluster.processes if p.name == name and p.core is not None)


def test_a_step_waits_for_a_lost_expert_until_it_returns() -> None:
    simulation = Simulation(scenario())
    simulation.supervisor.has_takeover = False
    simulation.supervisor.restart_s = 600.0
    simulation.cluster.world.call_at(
        0.003, lambda: simulation.supervisor.kill(worker(simulation, "w1"))
    )
    simulation.run()
    assert simulation.cluster.clock.now_s() > 60.0


@pytest.mark.parametrize("kind", ["experts", "attention"])
def test_a_worker_that_is_overloaded_for_long_is_asked_again_without_a_replay(kind: str) -> None:
    cut = AttentionCut.LAYERS if kind == "attention" else AttentionCut.REPLICATED
    simulation = Simulation(scenario(cut=cut))
    experts, attention = simulation.shards[worker(simulation, "w1")]
    runner = attention if kind == "attention" else experts
    assert runner is not None
    runner.refusals.extend([RefusalReason.OVERLOADED] * 3000)
    simulation.run()
    assert not runner.refusals
    assert _num_replays(simulation) == 0


def test_a_router_that_learns_late_of_a_new_placement_does_not_start_over() -> None:
    # Each worker has all experts, so only the chain's attention crosses processes.
    simulation = Simulation(scenario(cut=AttentionCut.LAYERS, replicas=2))
    core = worker(simulation, "w1").core
    assert core is not None
    simulation.cluster.world.call_at(0.003, lambda: core.fence.raise_epoch(2))
    simulation.cluster.world.call_at(0.3, simulation.supervisor.bump)
    simulation.run()
    assert _num_replays(simulation) == 0


@pytest.mark.parametrize("kind", ["experts", "attention", "both"])
def test_a_worker_slower_than_the_time_limit_is_waited_for_eventually(kind: str) -> None:
    simulation = Simulation(scenario(cut=AttentionCut.LAYERS))
    experts, attention = simulation.shards[worker(simulation, "w1")]
    assert attention is not None
    experts.compute_s = 0.0 if kind == "attention" else 3.0
    attention.compute_s = 0.0 if kind == "experts" else 3.0
    simulation.run()


def test_a_router_waits_while_its_chain_has_not_all_layers() -> None:
    """As while a cluster comes up. A router that does not wait would block the simulated clock."""
    simulation = Simulation(scenario(cut=AttentionCut.LAYERS))
    cluster = simulation.cluster
    view = cluster.view
    part = {"w1": view.members["w1"]}
    cluster.publish(ClusterView(placement_epoch=2, members=part, chains={"w0": ("w1",)}))
    whole = ClusterView(placement_epoch=3, members=view.members, chains=view.chains)
    cluster.world.call_at(0.5, lambda: cluster.publish(whole))
    simulation.run()
    assert _num_replays(simulation) == 2


def test_requests_leave_a_router_that_has_no_chain_any_more() -> None:
    simulation = Simulation(scenario(num_workers=2, replicas=2))
    cluster = simulation.cluster
    routed = RoutedRequest(request_id="r", request=REQUEST, timeout_s=9.0)
    recording = cluster.submit("w0", "r", routed)
    cluster.publish(ClusterView(placement_epoch=2, members=cluster.view.members, chains={}))
    assert recording.has_moved
    assert cluster.routers["w0"].num_active == 0
    cluster.close()


@pytest.mark.parametrize("at_s", [0.006, 0.008, 0.01, 0.012])
def test_a_chain_that_changes_in_mid_step_is_taken_up_by_the_next(at_s: float) -> None:
    simulation = Simulation(scenario(cut=AttentionCut.LAYERS))
    cluster = simulation.cluster
    view = cluster.view
    short = ClusterView(placement_epoch=2, members=view.members, chains={"w0": ("w0",)})
    whole = ClusterView(placement_epoch=3, members=view.members, chains=view.chains)
    cluster.world.call_at(at_s, lambda: cluster.publish(short))
    cluster.world.call_at(at_s + 0.003, lambda: cluster.publish(whole))
    simulation.run()
    assert _num_replays(simulation) >= 2


def test_a_cancelled_step_does_not_block_the_next() -> None:
    one_layer = fake_config(num_layers=1)
    whole = scenario()
    simulation = Simulation(
        dataclasses.replace(
            whole,
            config=one_layer,
            view=make_view(
                one_layer, num_workers=2, replicas=1, cut=AttentionCut.REPLICATED, num_routers=1
            ),
            arrivals=(),
        )
    )
    cluster = simulation.cluster
    assert {e.expert for e in cluster.view.members["w0"].experts} == {0, 2}
    simulation.supervisor.has_takeover = False
    simulation.supervisor.restart_s = 600.0
    simulation.supervisor.kill(worker(simulation, "w1"))
    # Tokens 1 and 3 go to experts 0 and 1, and to 0 and 2.
    for name, token in (("lost", 1), ("held", 3)):
        request = GenerationRequest(prompt_ids=(token,), max_tokens=1, sampling=REQUEST.sampling)
        recording = cluster.submit(
            "w0", name, RoutedRequest(request_id=name, request=request, timeout_s=900.0)
        )
        if name == "lost":
            cluster.run_until(lambda: cluster.clock.now_s() > 1.0)
            cluster.routers["w0"].cancel(name)
        else:
            cluster.run_until(lambda recording=recording: recording.has_ended)
    assert cluster.clock.now_s() < 10.0
    cluster.settle()
    simulation.supervisor.close()
    cluster.settle()
    cluster.close()


def _num_replays(simulation: Simulation) -> int:
    routers = [p.router for p in simulation.cluster.processes if p.router is not None]
    return sum(router.figures.num_replays for router in routers)
