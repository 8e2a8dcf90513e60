"""The kill matrix: clusters, sampling modes, and the message before which a process is hit.

A cell is a shape of cluster and a sampling mode. Its run is deterministic up to the first blow, so
the number of the next message names a moment: a blow falls just before that message. A schedule is
a list of blows. When a schedule fails, its error names the command that repeats it:

    python -m tests.simulation.replay --matrix 3w-2r-replicated-in --mode top-p --kill 17:w1,40:w0
"""

import dataclasses
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from enum import Enum

from milliways.cluster.control.planner import AttentionCut, PlacementPolicy
from milliways.cluster.control.targets import ControllerSettings
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SamplingParams
from milliways.router.limits import DispatchLimits, SchedulerLimits
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.rules import TokenRules
from milliways.wire.calls import AdvanceBatch, BeginBatch, RunExperts
from milliways.wire.view import EMPTY_VIEW
from tests.memory_cluster import ClusterSettings, Process
from tests.simulation.cluster import Simulation
from tests.simulation.controlled import ControlledSimulation
from tests.simulation.fake_model import expected_streams, fake_config, letter
from tests.simulation.scenario import Arrival, Scenario, make_view
from tests.simulation.true_sampler import TrueSampler

NUM_LAYERS = 2
CONFIG = fake_config(NUM_LAYERS)
CONTROLLER, INGRESS = "controller", "ingress"
# By this time the controller has brought its cluster up.
LED_ARRIVAL_S = 0.5
PROMPT = (5, 3, 17, 60)
GREEDY = SamplingParams(temperature=0.0)
PENALIZED = SamplingParams(
    temperature=0.9,
    top_p=0.8,
    presence_penalty=0.6,
    frequency_penalty=0.5,
    repetition_penalty=1.2,
    seed=11,
)

# (message, process): each process is hit just before its message. In the order of messages.
Blows = tuple[tuple[int, str], ...]


class Blow(Enum):
    """What happens to the victim."""

    KILL = "killed"
    # It freezes, is replaced, and then wakes up.
    REPLACE_FROZEN = "replaced"
    # It is considered silent, and its requests are hedged: without reason, or while it is frozen.
    RACE = "raced"
    RACE_FROZEN = "raced-frozen"


class Kind(Enum):
    """The part that a victim plays for the running requests."""

    EXPERTS = "a worker without attention"
    SHARD = "an attention shard whose router is elsewhere"
    ROUTER_WITH_SHARD = "a router with its attention shard"
    ROUTER = "a router in a process of its own"
    INGRESS = "the ingress"
    CONTROLLER = "the controller"


ROUTERS = frozenset({Kind.ROUTER_WITH_SHARD, Kind.ROUTER})
# Only these are replaced while they still live.
REPLACED = frozenset({Kind.EXPERTS, Kind.SHARD, Kind.ROUTER_WITH_SHARD})
# The kinds of process that a blow can hit.
VICTIMS = {
    Blow.KILL: frozenset(Kind),
    Blow.REPLACE_FROZEN: REPLACED,
    Blow.RACE: ROUTERS,
    Blow.RACE_FROZEN: ROUTERS,
}


class Phase(Enum):
    """Progress of the client's stream."""

    PREFILL = "no token yet"
    EARLY = "less than half of the tokens"
    MIDDLE = "half of them or more"
    LAST = "all but the last"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A small cluster. With `is_led` it is under the real controller."""

    num_workers: int
    replicas: int
    cut: AttentionCut
    num_routers: int = 1
    has_direct_links: bool = True
    kv_standby: bool = False
    is_led: bool = False
    has_exchange: bool = False

    def __str__(self) -> str:
        if self.is_led:
            return f"led-{self.num_workers}w-{self.replicas}r-{self.cut.value}"
        where = "in" if self.has_direct_links else "out"
        kind = "-copied" if self.kv_standby else "-compiled" if self.has_exchange else ""
        return f"{self.num_workers}w-{self.replicas}r-{self.cut.value}-{where}{kind}"


WHOLE, LAYERS = AttentionCut.REPLICATED, AttentionCut.LAYERS
SHAPES = (
    Shape(num_workers=2, replicas=1, cut=WHOLE),
    Shape(num_workers=3, replicas=2, cut=WHOLE, num_routers=2),
    Shape(num_workers=3, replicas=2, cut=WHOLE, num_routers=2, kv_standby=True),
    Shape(num_workers=2, replicas=2, cut=LAYERS),
    Shape(num_workers=3, replicas=1, cut=LAYERS),
    Shape(num_workers=2, replicas=1, cut=LAYERS, has_direct_links=False),
)
# Steps are compiled programs, and rows travel inside them.
COMPILED_SHAPES = (
    Shape(num_workers=2, replicas=1, cut=WHOLE, has_exchange=True),
    Shape(num_workers=3, replicas=1, cut=WHOLE, has_exchange=True),
    Shape(num_workers=3, replicas=2, cut=WHOLE, num_routers=2, has_exchange=True),
)
LED_SHAPES = (
    Shape(num_workers=2, replicas=1, cut=WHOLE, is_led=True),
    Shape(num_workers=3, replicas=2, cut=WHOLE, is_led=True, num_routers=2),
    Shape(num_workers=3, replicas=2, cut=LAYERS, is_led=True),
)


def request(
    sampling: SamplingParams, prompt_ids: tuple[int, ...] = PROMPT, **others: object
) -> GenerationRequest:
    """A request, by default for four tokens."""
    wanted = {"max_tokens": 4, "ignore_eos": True} | others
    return GenerationRequest(prompt_ids=prompt_ids, sampling=sampling, **wanted)  # pyright: ignore


def stopped_request() -> GenerationRequest:
    """A request that stops at its third and fourth letter, so that text is held back before."""
    whole = request(GREEDY, max_tokens=8)
    (stream,) = expected_streams(whole, CONFIG, TrueSampler())
    return dataclasses.replace(
        whole, stop=("".join(letter(token.token_id) for token in stream.tokens[2:4]),)
    )


def ruled_request() -> GenerationRequest:
    """A request of which nearly every token would be another one without its rules."""
    free = drawn_ids(request(GREEDY))
    rules = TokenRules(
        min_tokens=4,
        # Until it has so many tokens, these are not drawn.
        stop_token_ids=free[:2],
        allowed_token_ids=(*free, *range(20, 40)),
    )
    ruled = drawn_ids(request(GREEDY, rules=rules))
    words = (ruled[:3], (ruled[1],), (50,))
    return request(GREEDY, rules=dataclasses.replace(rules, bad_words=words))


def drawn_ids(wanted: GenerationRequest) -> tuple[int, ...]:
    (stream,) = expected_streams(wanted, CONFIG, TrueSampler())
    return tuple(token.token_id for token in stream.tokens)


# With this seed every layer of every step calls a worker without attention.
SEEDED = SamplingParams(temperature=0.7, seed=1)
MODES: dict[str, tuple[GenerationRequest, ...]] = {
    "greedy": (request(GREEDY),),
    "temperature": (request(SEEDED),),
    "top-p": (request(PENALIZED),),
    "logprobs": (request(dataclasses.replace(SEEDED, num_logprobs=3)),),
    "n-3": (request(SEEDED, num_samples=3),),
    "stop": (stopped_request(),),
    "rules": (ruled_request(),),
    # The second shares the first one's prefix, and draws nothing.
    "scored": (
        request(SEEDED, prompt_logprobs=2),
        request(GREEDY, (*PROMPT[:3], 1), max_tokens=0, prompt_logprobs=0),
    ),
    # Both run in one batch.
    "together": (
        request(GREEDY, (5, 3, 17), max_tokens=3, stop=("zz",), ignore_eos=False),
        request(dataclasses.replace(PENALIZED, num_logprobs=2), max_tokens=2, num_samples=2),
    ),
}


def scenario(shape: Shape, mode: str) -> Scenario:
    """The scenario of a cell, without blows."""
    made = Scenario(
        seed=3,
        config=CONFIG,
        view=EMPTY_VIEW,
        settings=ClusterSettings(
            cache_size=CacheSize(num_blocks=24, block_size=2, max_slots=4),
            # A prefill takes two steps.
            scheduler=SchedulerLimits(max_step_tokens=3),
            max_micro_batches=len(MODES[mode]),
            dispatch=DispatchLimits(hedge_after_s=0.05, timeout_s=1.0),
            has_direct_links=shape.has_direct_links,
            kv_standby=shape.kv_standby,
            has_exchange=shape.has_exchange,
        ),
        draw=TrueSampler(),
        arrivals=tuple(
            Arrival(at_s=LED_ARRIVAL_S if shape.is_led else 0.0, request=request)
            for request in MODES[mode]
        ),
        has_takeover=False,
    )
    if not shape.is_led:
        view = make_view(
            CONFIG,
            num_workers=shape.num_workers,
            replicas=shape.replicas,
            cut=shape.cut,
            num_routers=shape.num_routers,
        )
        return dataclasses.replace(made, view=view)
    wanted = ControllerSettings(
        num_workers=shape.num_workers,
        expert_replicas=shape.replicas,
        policy=PlacementPolicy(attention=shape.cut, kv_tokens=1),
        experts_only=shape.num_workers - shape.num_routers if shape.cut is WHOLE else 0,
    )
    # The next controller starts while streams still run.
    return dataclasses.replace(made, wanted=wanted, restart_s=0.02)


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """The state of a run when a message arrives; fields are None if it belongs to no step."""

    phase: Phase | None
    layer: int | None
    is_before_requests: bool = False


class Cell:
    """A shape with a mode: its undisturbed run, and its runs with blows."""

    def __init__(self, shape: Shape, mode: str) -> None:
        self.shape = shape
        self.mode = mode
        self.scenario = scenario(shape, mode)
        self.lengths = [
            [len(stream.tokens) for stream in expected_streams(r, CONFIG, self.scenario.draw)]
            for r in MODES[mode]
        ]
        simulation = self._simulation()
        # One for each message; moments[n - 1] is the state just before message n.
        self.moments: list[Moment] = []
        simulation.cluster.network.on_delivery = lambda receiver: self.moments.append(
            self._moment(simulation)
        )
        simulation.run()
        del self.moments[simulation.num_messages :]
        # Messages before the first request, while the cluster comes up.
        self.num_before_requests = sum(moment.is_before_requests for moment in self.moments)
        self.kinds = kinds_of(simulation)

    @property
    def num_messages(self) -> int:
        return len(self.moments)

    def run(self, blows: Blows, blow: Blow = Blow.KILL) -> Simulation:
        """Runs the cell with these blows; an error gets the command that repeats the run."""
        simulation = self.struck(blows, blow)
        try:
            simulation.run()
        except BaseException as error:
            error.add_note(f"to repeat: {self.command(blows, blow)}")
            raise
        return simulation

    def struck(self, blows: Blows, blow: Blow) -> Simulation:
        """A prepared run in which these processes are hit, if they live at that moment."""
        simulation = self._simulation()
        network = simulation.cluster.network
        left = deque(blows)

        def look(receiver: Process) -> None:
            while left and left[0][0] <= network.num_delivered:
                _, name = left.popleft()
                hit(simulation, name, blow)

        network.on_delivery = look
        return simulation

    def command(self, blows: Blows, blow: Blow = Blow.KILL) -> str:
        """The command that repeats one schedule of this cell and prints what happened."""
        words = ["python", "-m", "tests.simulation.replay"]
        words += ["--matrix", str(self.shape), "--mode", self.mode]
        words += ["--kill", ",".join(f"{n}:{name}" for n, name in blows)]
        if blow is not Blow.KILL:
            words += ["--blow", blow.value]
        return shlex.join(words)

    def _simulation(self) -> Simulation:
        make = ControlledSimulation if self.shape.is_led else Simulation
        return make(self.scenario)

    def _moment(self, simulation: Simulation) -> Moment:
        call = simulation.cluster.network.arriving
        is_of_layer = isinstance(call, BeginBatch | AdvanceBatch | RunExperts)
        layer = call.layer if is_of_layer else None
        return Moment(self._phase(simulation), layer, not simulation.ingress.journals)

    def _phase(self, simulation: Simulation) -> Phase | None:
        """The phase of the open stream that has made least progress."""
        behind: list[tuple[int, int]] = []
        for journal, lengths in zip(simulation.ingress.journals, self.lengths, strict=False):
            counts = [len(journal.delivered.get(i, ())) for i in range(len(lengths))]
            behind += [(n, of) for n, of in zip(counts, lengths, strict=True) if n < of]
        if not behind:
            return None
        num_delivered, length = min(behind)
        if num_delivered == 0:
            return Phase.PREFILL
        if num_delivered == length - 1:
            return Phase.LAST
        return Phase.EARLY if 2 * num_delivered < length else Phase.MIDDLE


def kinds_of(simulation: Simulation) -> dict[str, Kind]:
    """The processes that can be hit, by name."""
    in_chains = {name for chain in simulation.supervisor.view.chains.values() for name in chain}
    kinds = {INGRESS: Kind.INGRESS}
    for process in simulation.cluster.processes:
        if process.core is None and process.router is not None:
            kinds[process.name] = Kind.ROUTER
        elif process.core is not None and process.name in simulation.supervisor.view.chains:
            has_own = process.router is not None
            kinds[process.name] = Kind.ROUTER_WITH_SHARD if has_own else Kind.SHARD
        elif process.core is not None:
            kinds[process.name] = Kind.SHARD if process.name in in_chains else Kind.EXPERTS
    if isinstance(simulation, ControlledSimulation):
        kinds[CONTROLLER] = Kind.CONTROLLER
    return kinds


def hit(simulation: Simulation, name: str, blow: Blow) -> None:
    """Hits the living incarnation of this process, if there is one."""
    for process in simulation.cluster.processes:
        if process.name != name or not process.is_alive:
            continue
        now_s = simulation.cluster.clock.now_s()
        number = simulation.cluster.network.num_delivered
        simulation.log.append(f"{now_s:.4f} {name} is {blow.value} before message {number}")
        match blow:
            case Blow.KILL:
                simulation.supervisor.kill(process)
            case Blow.REPLACE_FROZEN:
                process.spend(0.1)
                simulation.supervisor.suspect(process)
            case Blow.RACE:
                simulation.ingress.hedge(process)
            case Blow.RACE_FROZEN:
                process.spend(0.1)
                simulation.ingress.hedge(process)
        return


def single_blows(
    cell: Cell,
    blow: Blow = Blow.KILL,
    stride: int = 1,
    of: frozenset[Kind] = frozenset(Kind),
) -> Iterator[Blows]:
    """One blow for each process and message; with a stride, they start at different messages."""
    offset = [*MODES].index(cell.mode)
    for i, (name, kind) in enumerate(cell.kinds.items()):
        if kind not in of & VICTIMS[blow]:
            continue
        for n in range(1 + (i + offset) % stride, cell.num_messages + 1, stride):
            yield ((n, name),)


def cell_of(shape_name: str, mode: str) -> Cell:
    """The cell with these names."""
    return Cell(
        next(s for s in (*SHAPES, *COMPILED_SHAPES, *LED_SHAPES) if str(s) == shape_name), mode
    )


def blows_of(words: str) -> Blows:
    """Parses text like 17:w1,40:w0."""
    pairs: Sequence[tuple[str, ...]] = [tuple(word.split(":", 1)) for word in words.split(",")]
    return tuple((int(n), name) for n, name in pairs)
