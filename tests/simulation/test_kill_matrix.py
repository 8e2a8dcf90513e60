"""Each process of a small cluster is killed at every message of a small run: same tokens.

The n-th message that arrives is the boundary: a process dies in the moment before. What the other
ends make of it, and when they notice, is as in every simulation.
"""

import dataclasses
from enum import Enum

import pytest

from cluster.placement import AttentionCut
from model.runner import CacheSize
from model.sampling_params import SamplingParams
from router.dispatch import DispatchLimits
from router.request import GenerateRequest
from tests.memory_cluster import ClusterSettings, Process
from tests.simulation.cluster import Simulation
from tests.simulation.fake_model import fake_config
from tests.simulation.scenario import Arrival, Scenario, make_view

CONFIG = fake_config(num_layers=2)


class Blow(Enum):
    """What becomes of the victim."""

    KILL = "killed"
    # It is replaced while it stands still, and then wakes up.
    REPLACE_FROZEN = "replaced"


REQUESTS = (
    GenerateRequest(
        prompt_ids=(5, 3, 17), max_tokens=3, sampling=SamplingParams(temperature=0.0), stop=("zz",)
    ),
    GenerateRequest(
        prompt_ids=(5, 3, 9, 1),
        max_tokens=2,
        num_samples=2,
        sampling=SamplingParams(temperature=0.7, frequency_penalty=0.5, num_logprobs=2, seed=7),
        ignore_eos=True,
    ),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A small cluster."""

    num_workers: int
    replicas: int
    cut: AttentionCut
    num_routers: int = 1
    has_direct_links: bool = True
    kv_standby: bool = False

    def __str__(self) -> str:
        where = "in" if self.has_direct_links else "out"
        copies = "-copied" if self.kv_standby else ""
        return f"{self.num_workers}w-{self.replicas}r-{self.cut.value}-{where}{copies}"


SHAPES = (
    Shape(num_workers=2, replicas=1, cut=AttentionCut.REPLICATED),
    Shape(num_workers=2, replicas=2, cut=AttentionCut.LAYERS),
    Shape(num_workers=3, replicas=2, cut=AttentionCut.REPLICATED, num_routers=2),
    Shape(num_workers=2, replicas=1, cut=AttentionCut.LAYERS, has_direct_links=False),
    Shape(num_workers=3, replicas=2, cut=AttentionCut.REPLICATED, num_routers=2, kv_standby=True),
)


def scenario(shape: Shape) -> Scenario:
    view = make_view(
        CONFIG,
        num_workers=shape.num_workers,
        replicas=shape.replicas,
        cut=shape.cut,
        num_routers=shape.num_routers,
    )
    return Scenario(
        seed=3,
        config=CONFIG,
        view=view,
        settings=ClusterSettings(
            cache_size=CacheSize(num_blocks=16, block_size=2, max_slots=4),
            dispatch=DispatchLimits(hedge_after_s=0.05, timeout_s=1.0),
            has_direct_links=shape.has_direct_links,
            kv_standby=shape.kv_standby,
        ),
        arrivals=tuple(Arrival(at_s=0.0, request=request) for request in REQUESTS),
        has_takeover=False,
    )


def run_with_blows(made: Scenario, blows: dict[int, str], blow: Blow) -> None:
    """Runs it; `blows` says who is hit before which message."""
    simulation = Simulation(made)
    network = simulation.cluster.network

    def look(receiver: Process) -> None:
        name = blows.get(network.num_delivered)
        for process in simulation.cluster.processes:
            if process.name == name and process.is_alive:
                if blow is Blow.REPLACE_FROZEN:
                    process.spend(0.1)
                    simulation.supervisor.suspect(process)
                else:
                    simulation.supervisor.kill(process)
                return

    network.on_delivery = look
    try:
        simulation.run()
    except BaseException as error:
        error.add_note(f"{blow.value}, before message: {blows}")
        raise


def undisturbed(made: Scenario) -> tuple[list[str], int]:
    """Whom there is to hit, and how many messages there are."""
    simulation = Simulation(made)
    names = [p.name for p in simulation.cluster.processes if p.core or p.router]
    simulation.run()
    return names, simulation.num_messages


@pytest.mark.parametrize("blow", Blow, ids=lambda blow: blow.value)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_death_at_any_message_costs_a_token(shape: Shape, blow: Blow) -> None:
    made = scenario(shape)
    names, last = undisturbed(made)
    for name in names:
        if blow is Blow.REPLACE_FROZEN and name.startswith("router of"):
            continue
        for n in range(1, last + 1):
            run_with_blows(made, {n: name}, blow)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_two_deaths_cost_a_token(shape: Shape) -> None:
    made = scenario(shape)
    names, last = undisturbed(made)
    for first in range(1, last, 3):
        for second in range(first + 1, first + 60, 7):
            for i, name in enumerate(names):
                other = names[(i + second) % len(names)]
                run_with_blows(made, {first: name, second: other}, Blow.KILL)
