"""Several ingress replicas that share several routers, in one thread on a fake clock.

`RouterChoice`, `Router` and `Scheduler` are the production code. A micro-batch is not computed, it
only takes time: a part for the step, and a part for each row. Messages take `NETWORK_S`; routers
report their load as often as in production.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, cast

from milliways.cluster.ingress.routing.router_choice import Assignment, RouterChoice, RouterInfo
from milliways.model.block_pool import BlockPool
from milliways.model.config import ModelConfig
from milliways.model.sampling_params import SampledToken, SamplingParams
from milliways.router.limits import RouterLimits, SchedulerLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.pipeline import Pipeline
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import NoText, PromptScores, TokenEvent
from milliways.router.router import Router
from milliways.router.scheduler import ScheduledSequence
from milliways.router.server import REPORT_EVERY_S
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Signal, Tasks
from milliways.wire.errors import ClusterError
from milliways.wire.load import Load

NETWORK_S = 0.001
STEP_S = 0.01
ROW_S = 0.0005
_TOKEN = SampledToken(token_id=1, logprob=0.0, top_logprobs=(), is_valid=True)
_TIMEOUT_S = 1e6


class NoPipeline:
    """The pipeline of a router that computes nothing."""

    chain = ()
    is_whole = True
    computes_at_once = False


class SlowRouter(Router):
    """Takes the time of a micro-batch, and draws the same token for every sequence."""

    async def _compute(
        self, batch: list[ScheduledSequence], caution_s: float | None
    ) -> tuple[SampledToken, ...]:
        num_rows = sum(entry.num_tokens for entry in batch)
        await self._tasks.sleep(STEP_S + ROW_S * num_rows)
        return (_TOKEN,) * sum(entry.num_logits for entry in batch)


@dataclass
class NoLinks:
    """The connections of a router that needs none."""

    router_id: str
    incarnation: int = 1
    changed: Signal = field(default_factory=Signal)

    def is_open(self, worker_id: str) -> bool:
        return True


@dataclass(eq=False)
class Ask:
    """A request, when it arrives, and how long it waited for its first token."""

    request: GenerationRequest
    arrives_s: float
    waited_s: float = -1.0


class Replica:
    """An ingress replica: it decides where its requests go, as `RouterSource` does."""

    def __init__(self, cluster: "SharedRouters", name: str, random: Random) -> None:
        self.name = name
        self.choice = RouterChoice(random)
        self._cluster = cluster

    def hear(self, worker_id: str, others: Load) -> None:
        """A report arrives."""
        self.choice.report(worker_id, others, self._cluster.clock.now_s())

    def send(self, ask: Ask) -> None:
        """Sends a request to the router that looks best."""
        cluster, prompt_ids = self._cluster, ask.request.prompt_ids
        picked = self.choice.try_pick(cluster.infos, prompt_ids, cluster.clock.now_s())
        assert picked is not None
        load = Load(ask.request.num_samples, len(prompt_ids))
        assignment = self.choice.begin(picked.worker_id, prompt_ids, load)
        routed = RoutedRequest(
            request_id=f"{id(ask)}",
            request=ask.request,
            timeout_s=_TIMEOUT_S,
            ingress_id=self.name,
        )
        stream = _Stream(self, ask, assignment, cluster)
        router = cluster.routers[picked.worker_id]
        cluster.later(lambda: router.submit(routed, stream))


@dataclass(eq=False)
class _Stream:
    """A listener in the router; the replica hears of everything `NETWORK_S` later."""

    replica: Replica
    ask: Ask
    assignment: Assignment
    cluster: "SharedRouters"
    num_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_left = self.ask.request.num_samples

    def scored(self, scores: PromptScores) -> None:
        raise AssertionError("no request is scored")

    def tokens(self, events: list[TokenEvent]) -> None:
        self.cluster.later(lambda: self._received(events))

    def ended(self, error: ClusterError | None) -> None:
        assert error is None
        self.cluster.later(lambda: self.replica.choice.end(self.assignment))

    def moved(self) -> None:
        raise AssertionError("no router drains")

    def _received(self, events: list[TokenEvent]) -> None:
        if self.ask.waited_s < 0:
            self.ask.waited_s = self.cluster.clock.now_s() - self.ask.arrives_s
        self.num_left -= sum(event.finish_reason is not None for event in events)
        self.replica.choice.progressed(self.assignment, Load(self.num_left, 0))


class SharedRouters:
    """Routers, and the replicas that send requests to them."""

    def __init__(self, config: ModelConfig, *, num_routers: int, seed: str) -> None:
        self.clock = FakeClock()
        self.tasks = Tasks(self.clock)
        self.replicas: list[Replica] = []
        self.routers = {
            f"worker-{i}": self._router(f"worker-{i}", config) for i in range(num_routers)
        }
        self.infos = [RouterInfo(name, name) for name in self.routers]
        self._seed = seed
        for router in self.routers.values():
            self.tasks.start_service(router.serve())

    def join(self) -> None:
        """Adds a replica. Before its first request it hears the load of each router."""
        name = f"ingress-{len(self.replicas)}"
        replica = Replica(self, name, Random(f"{self._seed} {name}"))
        for worker_id, router in self.routers.items():
            replica.hear(worker_id, _others(router, name))
            self.tasks.start_service(self._report(router, worker_id, replica))
        self.replicas.append(replica)

    def later(self, call: Callable[[], None]) -> None:
        """Calls after the time of a message."""
        self.tasks.call_later(NETWORK_S, call)

    def run(self, asks: Sequence[Ask], choose: Random) -> None:
        """Sends each request from a replica at random; returns when all have their first token."""
        for ask in asks:
            share = choose.random()
            self.tasks.call_at(ask.arrives_s, partial(self._send, ask, share))
        while any(ask.waited_s < 0 for ask in reversed(asks)):
            while self.tasks.run_ready():
                pass
            next_s = self.tasks.next_timer_s()
            assert next_s is not None
            self.clock.advance_to(next_s)

    def _send(self, ask: Ask, share: float) -> None:
        self.replicas[int(share * len(self.replicas))].send(ask)

    def _router(self, name: str, config: ModelConfig) -> Router:
        limits = RouterLimits(scheduler=SchedulerLimits(), max_micro_batches=1)
        return SlowRouter(
            config,
            BlockPool(num_blocks=4096, block_size=16),
            limits,
            cast(LinkTable, NoLinks(name)),
            cast(Pipeline, NoPipeline()),
            lambda _: NoText(),
            self.tasks,
        )

    async def _report(self, router: Router, worker_id: str, replica: Replica) -> None:
        while True:
            load = _others(router, replica.name)
            self.later(lambda load=load: replica.hear(worker_id, load))
            await self.tasks.sleep(REPORT_EVERY_S)


def _others(router: Router, name: str) -> Load:
    return sum((load for other, load in router.loads().items() if other != name), Load())


def mixed_asks(random: Random, count: int, per_s: float) -> list[Ask]:
    """Short and long requests, some with many samples, at random times."""
    asks: list[Ask] = []
    now_s = 0.0
    for _ in range(count):
        now_s += random.expovariate(per_s)
        kind = random.random()
        if kind < 0.85:
            size, num_tokens, num_samples = random.randint(8, 48), random.randint(2, 8), 1
        elif kind < 0.98:
            size, num_tokens, num_samples = random.randint(200, 800), random.randint(20, 60), 1
        else:
            size, num_tokens, num_samples = 32, random.randint(10, 40), random.choice((16, 32, 64))
        request = GenerationRequest(
            prompt_ids=tuple(random.randrange(3, 64) for _ in range(size)),
            max_tokens=num_tokens,
            num_samples=num_samples,
            sampling=SamplingParams(temperature=0.0, seed=0),
            ignore_eos=True,
        )
        asks.append(Ask(request, now_s))
    return asks


def percentile(asks: Sequence[Ask], share: float) -> float:
    """The time within which this share of the requests got their first token."""
    waits: list[Any] = sorted(ask.waited_s for ask in asks)
    return waits[int(share * (len(waits) - 1))]
