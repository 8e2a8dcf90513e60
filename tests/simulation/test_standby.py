"""Copies of KV blocks at a standby: same tokens, few positions computed again, nothing leaked.

To repeat a failing seed: `python -m tests.simulation.replay --standby --seed 1017 --faults 4`, with
`--controlled` if the test's name says so.
"""

import dataclasses
from random import Random

import pytest

from milliways.cluster.control.planner import AttentionCut
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SamplingParams
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.request import GenerationRequest
from milliways.router.standby import StandbyFigures
from tests.memory_cluster import ClusterSettings, Process
from tests.simulation.cluster import Simulation
from tests.simulation.controlled import ControlledSimulation
from tests.simulation.fake_model import fake_config
from tests.simulation.scenario import (
    Arrival,
    Scenario,
    make_view,
    random_controlled_scenario,
    random_scenario,
    random_tokens,
    with_standby,
)

BLOCK = 4
CONFIG = fake_config(num_layers=3, sequence_len=256)
MAX_TOKENS = 100
PROMPT = random_tokens(Random(3), 120)
REQUEST = GenerationRequest(
    prompt_ids=PROMPT,
    max_tokens=MAX_TOKENS,
    sampling=SamplingParams(temperature=0.7, frequency_penalty=0.5, seed=5),
    ignore_eos=True,
)
MAX_FAULTS = 4


def scenario(
    *,
    kv_standby: bool = True,
    num_blocks: int = 128,
    max_running: int = 8,
    cut: AttentionCut = AttentionCut.REPLICATED,
) -> Scenario:
    """One long request on three workers, each with a router."""
    return Scenario(
        seed=1,
        config=CONFIG,
        view=make_view(CONFIG, num_workers=3, replicas=2, cut=cut),
        settings=ClusterSettings(
            cache_size=CacheSize(num_blocks=num_blocks, block_size=BLOCK, max_slots=8),
            scheduler=SchedulerLimits(max_step_tokens=16, max_running=max_running),
            kv_standby=kv_standby,
        ),
        arrivals=(Arrival(at_s=0.0, request=REQUEST),),
        restart_s=600.0,
    )


def kill_router_at(simulation: Simulation, num_tokens: int) -> list[Process]:
    """Kills the request's router once the client has `num_tokens`; returns its process then."""
    died: list[Process] = []

    def look(receiver: Process) -> None:
        journals = simulation.ingress.journals
        if died or not journals or len(journals[0].delivered.get(0, ())) < num_tokens:
            return
        (victim,) = [
            p for p in simulation.cluster.processes if p.router is not None and p.router.num_active
        ]
        died.append(victim)
        simulation.supervisor.kill(victim)

    simulation.cluster.network.on_delivery = look
    return died


def positions_after(made: Scenario, num_tokens: int) -> tuple[int, Process, Simulation]:
    """Positions computed by other routers after the death, the dead process, and the run."""
    simulation = Simulation(made)
    died = kill_router_at(simulation, num_tokens)
    simulation.run()
    (victim,) = died
    others = [p for p in simulation.cluster.processes if p.router and p is not victim]
    return sum(p.router.figures.num_positions for p in others if p.router), victim, simulation


@pytest.mark.parametrize("num_tokens", [1, 40, 90])
def test_what_was_copied_is_not_computed_again(num_tokens: int) -> None:
    num_positions, victim, _ = positions_after(scenario(), num_tokens)
    assert victim.router is not None and victim.router.copies is not None
    left = MAX_TOKENS - num_tokens
    # The tokens left, a block that was not full, and one that was on its way.
    assert num_positions <= left + 2 * BLOCK
    assert (
        victim.router.copies.standby.figures.num_copied >= (len(PROMPT) + num_tokens) // BLOCK - 2
    )


def test_without_copies_the_whole_prefix_is_computed_again() -> None:
    num_positions, _, _ = positions_after(scenario(kv_standby=False), 90)
    assert num_positions >= len(PROMPT) + 90


def test_nothing_is_copied_if_attention_is_split_by_layers() -> None:
    simulation = Simulation(scenario(cut=AttentionCut.LAYERS))
    simulation.run()
    for router in simulation.cluster.routers.values():
        assert router.standby_id == ""
        assert router.copies is not None and router.copies.num_kept == 0
        assert router.copies.standby.figures == StandbyFigures()


def test_the_copies_of_a_router_that_dies_in_prefill_are_used() -> None:
    made = scenario()
    simulation = Simulation(made)
    victims: list[Process] = []

    def look(receiver: Process) -> None:
        for process in simulation.cluster.processes:
            router = process.router
            if not victims and router is not None and router.figures.num_positions > 80:
                victims.append(process)
                simulation.supervisor.kill(process)

    simulation.cluster.network.on_delivery = look
    simulation.run()
    others = [p.router for p in simulation.cluster.processes if p.router and p not in victims]
    num_positions = sum(router.figures.num_positions for router in others)
    whole = len(PROMPT) + MAX_TOKENS - 1
    # Of 80 positions, a chunk may not have been copied, and the last may not have been reported.
    assert num_positions <= whole - 80 + 3 * 16


def test_the_next_standby_receives_all_blocks_when_the_first_dies() -> None:
    made = scenario()
    simulation = Simulation(made)
    kills: list[str] = []

    def look(receiver: Process) -> None:
        journals = simulation.ingress.journals
        if not journals:
            return
        num_tokens = len(journals[0].delivered.get(0, ()))
        serving = [p for p in simulation.cluster.processes if p.router and p.router.num_active]
        if not serving or serving[0].router is None:
            return
        if num_tokens > 20 and not kills:
            kills.append(serving[0].router.standby_id)
            standby = next(p for p in simulation.cluster.processes if p.name == kills[0])
            simulation.supervisor.kill(standby)
        elif num_tokens > 80 and len(kills) == 1:
            kills.append(serving[0].name)
            simulation.supervisor.kill(serving[0])

    simulation.cluster.network.on_delivery = look
    simulation.run()
    assert len(set(kills)) == 2
    (last,) = [p.router for p in simulation.cluster.processes if p.router and p.name not in kills]
    assert last.figures.num_positions <= MAX_TOKENS - 80 + 2 * BLOCK


def test_a_full_standby_takes_no_blocks_from_its_own_requests() -> None:
    """Each router has room for one such request, so none has room for copies."""
    made = scenario(num_blocks=-(-(len(PROMPT) + MAX_TOKENS) // BLOCK), max_running=1)
    arrivals = tuple(
        Arrival(
            at_s=0.0,
            request=dataclasses.replace(REQUEST, prompt_ids=random_tokens(Random(i), len(PROMPT))),
        )
        for i in range(6)
    )
    simulation = Simulation(dataclasses.replace(made, arrivals=arrivals))
    simulation.run()
    copies = [router.copies for router in simulation.cluster.routers.values()]
    assert sum(c.standby.figures.num_dropped for c in copies if c is not None) > 0
    total = sum(r.figures.num_positions for r in simulation.cluster.routers.values())
    assert total == 6 * (len(PROMPT) + MAX_TOKENS - 1)


@pytest.mark.parametrize("seed", range(1000, 1120), ids=lambda seed: f"seed-{seed}-struck")
def test_faults_cost_no_token_while_blocks_are_copied(seed: int) -> None:
    Simulation(with_standby(random_scenario(seed, MAX_FAULTS))).run()


@pytest.mark.parametrize("seed", range(2000, 2040), ids=lambda seed: f"seed-{seed}-controlled")
def test_faults_cost_no_token_under_the_controller(seed: int) -> None:
    ControlledSimulation(with_standby(random_controlled_scenario(seed, MAX_FAULTS))).run()


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(200, 220), ids=lambda hundred: f"seeds-{hundred}00")
def test_many_faults_cost_no_token_while_blocks_are_copied(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        try:
            Simulation(with_standby(random_scenario(seed, 3 * MAX_FAULTS))).run()
        except BaseException as error:
            error.add_note(f"seed {seed}, --faults {3 * MAX_FAULTS}, --standby")
            raise
