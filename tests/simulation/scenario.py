"""The description of one simulated run. A random scenario depends on its seed only."""

import dataclasses
from dataclasses import dataclass
from random import Random

from milliways.cluster.control.planner import AttentionCut, PlacementPolicy, WorkerMemory, plan
from milliways.cluster.control.targets import ControllerSettings
from milliways.model.config import ModelConfig
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SamplingParams
from milliways.router.limits import DispatchLimits, SchedulerLimits
from milliways.router.requests.request import GenerationRequest
from milliways.wire.placement import ModelBytes
from milliways.wire.view import EMPTY_VIEW, ClusterView
from milliways.workers.core import CoreLimits
from tests.memory_cluster import ClusterSettings
from tests.shards import view_of
from tests.simulation.fake_model import VOCAB_SIZE, Draw, draw, fake_config, letter
from tests.simulation.faults import Fault

FOR_EVER_S = 1e5


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request, its arrival, its time limit, and when its client leaves."""

    at_s: float
    request: GenerationRequest
    timeout_s: float = FOR_EVER_S
    cancel_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A worker is drained for a while."""

    at_s: float
    worker_id: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault, its time, and a number that decides which process it hits and how."""

    at_s: float
    fault: Fault
    draw: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskChange:
    """From a moment on, a worker's files have other bytes, or none (None) can be read."""

    at_s: float
    worker_id: str
    content: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run."""

    seed: int
    config: ModelConfig
    view: ClusterView
    settings: ClusterSettings
    core_limits: CoreLimits = dataclasses.field(default_factory=CoreLimits)
    compute_s: float = 0.0
    draw: Draw = dataclasses.field(default=draw, repr=False)
    arrivals: tuple[Arrival, ...] = ()
    drains: tuple[Drain, ...] = ()
    strikes: tuple[Strike, ...] = ()
    restart_s: float = 0.2
    has_takeover: bool = True
    # Settings of the real controller; and its scalings, as (time, number of workers).
    wanted: ControllerSettings | None = None
    scalings: tuple[tuple[float, int], ...] = ()
    # What becomes of the disks of workers.
    disks: tuple[DiskChange, ...] = ()

    def __str__(self) -> str:
        return f"seed-{self.seed}"


def random_scenario(seed: int, num_faults: int = 0) -> Scenario:
    """A random run with up to `num_faults` faults."""
    random = Random(seed)
    config = fake_config(
        num_layers=random.randint(1, 4), num_experts=random.choice((2, 4, 8)), sequence_len=48
    )
    view = random_view(random, config)
    arrivals = random_arrivals(random)
    end_s = max(arrival.at_s for arrival in arrivals) + 0.05
    names = sorted(view.members)
    return Scenario(
        seed=seed,
        config=config,
        view=view,
        settings=random_settings(random, seed),
        core_limits=CoreLimits(
            max_waiting_calls=random.choice((2, 8, 256)), max_merged_rows=random.choice((4, 1024))
        ),
        compute_s=random.choice((0.0, 0.0002, 0.002)),
        arrivals=arrivals,
        drains=tuple(
            Drain(
                at_s=random.uniform(0.0, end_s),
                worker_id=random.choice(names),
                for_s=random.uniform(0.0, 0.1),
            )
            for _ in range(random.choice((0, 0, 1, 2)))
        ),
        strikes=random_strikes(random, num_faults, end_s),
        restart_s=random.choice((0.01, 0.2, 2.0)),
        has_takeover=random.random() < 0.5,
    )


def random_controlled_scenario(seed: int, num_faults: int = 0) -> Scenario:
    """A random run under the real controller."""
    scenario = random_scenario(seed, num_faults)
    random = Random(seed)
    num_workers = random.randint(1, 4)
    replicas = random.randint(1, min(2, num_workers))
    cut = random.choice((AttentionCut.REPLICATED, AttentionCut.LAYERS))
    return dataclasses.replace(
        scenario,
        view=EMPTY_VIEW,
        settings=dataclasses.replace(scenario.settings, has_direct_links=True),
        drains=(),
        strikes=tuple(
            dataclasses.replace(strike, at_s=strike.at_s + random.uniform(0.0, 0.5))
            for strike in scenario.strikes
        ),
        arrivals=tuple(
            dataclasses.replace(arrival, at_s=arrival.at_s + random.uniform(0.0, 0.5))
            for arrival in scenario.arrivals
        ),
        wanted=ControllerSettings(
            num_workers=num_workers,
            expert_replicas=replicas,
            policy=PlacementPolicy(attention=cut, kv_tokens=1),
        ),
        scalings=tuple(
            (random.uniform(0.3, 1.0), random.randint(replicas, 5))
            for _ in range(random.choice((0, 0, 1, 2)))
        ),
    )


def with_bad_disks(scenario: Scenario) -> Scenario:
    """The same run, while files of some workers are other ones, or missing, for some time."""
    random = Random(scenario.seed)
    disks: list[DiskChange] = []
    for number in range(5):
        if random.random() < 0.6:
            worker_id, at_s = f"worker-{number}", random.uniform(0.2, 1.5)
            content = random.choice(("b" * 32, None))
            disks.append(DiskChange(at_s=at_s, worker_id=worker_id, content=content))
            back_s = at_s + random.choice((0.1, 2.0, 20.0))
            disks.append(DiskChange(at_s=back_s, worker_id=worker_id, content="a" * 32))
    return dataclasses.replace(scenario, disks=tuple(disks))


def with_standby(scenario: Scenario) -> Scenario:
    """The same run, with routers that copy their KV blocks to one another."""
    settings = dataclasses.replace(scenario.settings, kv_standby=True, has_direct_links=True)
    return dataclasses.replace(scenario, settings=settings)


def random_strikes(random: Random, num_max: int, end_s: float) -> tuple[Strike, ...]:
    """Up to `num_max` faults; at most two fail a step, as routers give up a step after three."""
    faults = [random.choice(list(Fault)) for _ in range(random.randint(min(1, num_max), num_max))]
    failures = [i for i, fault in enumerate(faults) if fault is Fault.FAIL_ONCE]
    for i in failures[2:]:
        faults[i] = Fault.KILL_EXPERTS
    return tuple(
        Strike(random.uniform(0.0, end_s), fault, random.randrange(1 << 30)) for fault in faults
    )


def random_view(random: Random, config: ModelConfig) -> ClusterView:
    """A placement by the planner; some workers may have no attention."""
    num_workers = random.randint(1, 5)
    cut = random.choice((AttentionCut.REPLICATED, AttentionCut.LAYERS))
    return make_view(
        config,
        num_workers=num_workers,
        replicas=random.randint(1, min(3, num_workers)),
        cut=cut,
        num_routers=random.randint(1, num_workers),
    )


def make_view(
    config: ModelConfig, *, num_workers: int, replicas: int, cut: AttentionCut, num_routers: int = 9
) -> ClusterView:
    """A placement; replicated attention is on the first `num_routers` workers only."""
    sizes = ModelBytes(
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        expert_bytes=1,
        attention_layer_bytes=1,
        end_bytes=1,
        kv_layer_bytes_per_token=1,
    )
    workers = [
        WorkerMemory(worker_id=f"w{i}", node_id=f"n{i}", memory_bytes=1 << 40)
        for i in range(num_workers)
    ]
    view = view_of(plan(sizes, workers, PlacementPolicy(expert_replicas=replicas, attention=cut)))
    if cut is AttentionCut.LAYERS:
        return view
    members = dict(view.members)
    for name in sorted(members)[num_routers:]:
        members[name] = dataclasses.replace(members[name], num_layers=0, has_ends=False)
    chains = {name: chain for name, chain in view.chains.items() if members[name].has_ends}
    return dataclasses.replace(view, members=members, chains=chains)


def random_settings(random: Random, seed: int) -> ClusterSettings:
    block_size = random.choice((1, 2, 4))
    # One sequence of full length always fits; two often do not.
    num_blocks = random.randint(1, 3) * -(-48 // block_size)
    return ClusterSettings(
        cache_size=CacheSize(num_blocks=num_blocks, block_size=block_size, max_slots=16),
        scheduler=SchedulerLimits(
            max_running=random.randint(1, 8),
            max_step_tokens=random.choice((1, 3, 8, 64)),
            max_waiting=random.choice((0, 4, 64)),
        ),
        max_micro_batches=random.randint(1, 3),
        dispatch=DispatchLimits(
            hedge_after_s=random.choice((0.01, 0.05, 1.0)), timeout_s=random.choice((1.0, 3.0))
        ),
        seed=seed,
        delay_s_max=random.choice((0.0002, 0.002, 0.02)),
        has_direct_links=random.random() < 0.7,
    )


def random_arrivals(random: Random) -> tuple[Arrival, ...]:
    """Requests; some share a prefix, some are cancelled or time out."""
    shared = random_tokens(random, random.randint(1, 14))
    within_s = random.choice((0.0, 0.05, 0.3))
    arrivals: list[Arrival] = []
    for _ in range(random.randint(1, 10)):
        fate = random.random()
        arrivals.append(
            Arrival(
                at_s=random.uniform(0.0, within_s),
                request=random_request(random, shared),
                timeout_s=random.uniform(0.01, 0.3) if fate < 0.1 else FOR_EVER_S,
                cancel_after_s=random.uniform(0.0, 0.2) if fate > 0.9 else None,
            )
        )
    return tuple(arrivals)


def random_request(random: Random, shared: tuple[int, ...]) -> GenerationRequest:
    own = random_tokens(random, random.randint(1, 10))
    sampling = SamplingParams(
        temperature=random.choice((0.0, 0.7)),
        frequency_penalty=random.choice((0.0, 0.0, 0.5)),
        num_logprobs=random.choice((0, 0, 2)),
        seed=random.randrange(100),
    )
    stop = "".join(letter(token) for token in random_tokens(random, random.randint(1, 2)))
    prompt_ids = shared + own if random.random() < 0.6 else own
    max_tokens = random.choice((1, 4, 12, 40))
    # Derived from the seed, not drawn, so that the other draws of a run stay the same.
    is_scored, is_only_scored = sampling.seed % 4 == 0, sampling.seed % 12 == 0
    return GenerationRequest(
        prompt_ids=prompt_ids,
        max_tokens=0 if is_only_scored else max_tokens,
        prompt_logprobs=2 if is_scored else None,
        sampling=sampling,
        num_samples=random.choice((1, 1, 1, 2, 3)),
        stop=(stop,) if random.random() < 0.3 else (),
        ignore_eos=random.random() < 0.5,
    )


def random_tokens(random: Random, count: int) -> tuple[int, ...]:
    return tuple(random.randrange(VOCAB_SIZE) for _ in range(count))
