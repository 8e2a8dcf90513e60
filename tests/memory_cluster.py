"""A cluster in one thread: routers, workers and the messages between them, without a network.

Messages take time on a fake clock, in an order that a seed decides. What runs is the production
code: cores, dispatch, pipeline, router; only links and clock are replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from cluster.calls import Call, Fence, Result
from cluster.clock import FakeClock
from cluster.errors import ClusterError, PeerLostError
from cluster.links import WorkerLink
from cluster.tasks import Pending, Tasks
from cluster.view import ClusterView, Member
from model.block_pool import BlockPool
from model.config import ModelConfig
from model.runner import CacheSize
from router.admission import DetokenizerFor, RoutedRequest
from router.dispatch import Dispatcher, DispatchLimits
from router.link_table import LinkTable
from router.pipeline import Pipeline
from router.router import Router, RouterLimits
from router.scheduler import SchedulerLimits
from router.sequence import TokenEvent
from workers.core import WorkerCore


class Network:
    """Carries messages with a delay that a seed draws, and breaks links on demand."""

    def __init__(self, tasks: Tasks, seed: int = 0, delay_s_max: float = 0.002) -> None:
        self._tasks = tasks
        self._random = Random(seed)
        self._delay_s_max = delay_s_max
        self._links: list[MemoryLink] = []

    def delay_s(self) -> float:
        return self._random.uniform(0.0, self._delay_s_max)

    def connect(self, core: WorkerCore, router_id: str) -> "MemoryLink":
        link = MemoryLink(core, router_id, self, self._tasks)
        self._links.append(link)
        return link

    def cut(self, worker_id: str) -> None:
        """Breaks every link to a worker, as its death does."""
        for link in [link for link in self._links if link.core.worker_id == worker_id]:
            self._links.remove(link)
            link.break_off()


class MemoryLink:
    """A way to a core through the network; messages of one link stay in order each way."""

    transport = "memory"

    def __init__(self, core: WorkerCore, router_id: str, network: Network, tasks: Tasks) -> None:
        self.core = core
        self._router_id = router_id
        self._network = network
        self._tasks = tasks
        self._waiting: list[Pending[Result]] = []
        self._is_closed = False
        self._last_there_s = 0.0

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        answer: Pending[Result] = Pending()
        if self._is_closed:
            answer.fail(PeerLostError(self.core.worker_id, "closed"))
            return answer
        self._waiting.append(answer)
        answer.when_done(lambda: self._waiting.remove(answer))
        now_s = self._tasks.clock.now_s()
        self._last_there_s = max(self._last_there_s, now_s + self._network.delay_s())
        self._tasks.call_at(self._last_there_s, lambda: self._arrive(call, fence, answer))
        return answer

    def close(self) -> None:
        if not self._is_closed:
            self.break_off()
            self.core.router_gone(self._router_id)

    def break_off(self) -> None:
        """The other side is gone: everything that waits fails."""
        self._is_closed = True
        for answer in list(self._waiting):
            answer.fail(PeerLostError(self.core.worker_id, "the stream broke"))

    def _arrive(self, call: Call, fence: Fence, answer: Pending[Result]) -> None:
        if not self._is_closed:
            self.core.submit(call, fence, lambda result: self._reply(answer, result))

    def _reply(self, answer: Pending[Result], result: Result) -> None:
        self._tasks.call_later(self._network.delay_s(), lambda: answer.resolve(result))


class DirectLink:
    """A way to the core of the same process."""

    transport = "direct"

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        answer: Pending[Result] = Pending()
        answer.resolve(self._core.compute_now(call, fence))
        return answer

    def close(self) -> None:
        pass


@dataclass(slots=True)
class Heard:
    """A listener that keeps what it hears."""

    events: list[TokenEvent] = field(default_factory=list)
    error: ClusterError | None = None
    has_ended: bool = False
    has_moved: bool = False

    def tokens(self, events: Sequence[TokenEvent]) -> None:
        assert not self.has_ended
        self.events += events

    def ended(self, error: ClusterError | None) -> None:
        assert not self.has_ended
        self.has_ended, self.error = True, error

    def moved(self) -> None:
        self.has_moved = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What a test may want of routers."""

    cache_size: CacheSize
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_micro_batches: int = 2
    min_micro_batch_tokens: int = 1
    dispatch: DispatchLimits = field(default_factory=DispatchLimits)
    seed: int = 0
    has_direct_links: bool = True


class MemoryCluster:
    """Owns the clock and the tasks of a whole cluster, and runs it until something is so."""

    def __init__(
        self,
        config: ModelConfig,
        settings: ClusterSettings,
        make_core: Callable[[Member, Tasks], WorkerCore],
        view: ClusterView,
        detokenizer_for: DetokenizerFor,
    ) -> None:
        self.clock = FakeClock()
        self.tasks = Tasks(self.clock)
        self.network = Network(self.tasks, settings.seed)
        self.view = view
        self.cores: dict[str, WorkerCore] = {}
        self.routers: dict[str, Router] = {}
        self._config = config
        self._settings = settings
        self._make_core = make_core
        self._detokenizer_for = detokenizer_for
        for member in view.members.values():
            self.start_worker(member)
        for router_id in view.chains:
            self.start_router(router_id)
        self.publish(view)

    def start_worker(self, member: Member) -> WorkerCore:
        core = self._make_core(member, self.tasks)
        self.cores[member.worker_id] = core
        self.tasks.start_service(core.serve())
        return core

    def start_router(self, router_id: str) -> Router:
        settings, tasks = self._settings, self.tasks
        links = LinkTable(router_id, 1, lambda member: self._connect(router_id, member), tasks)
        dispatcher = Dispatcher(links, settings.dispatch, tasks)
        pipeline = Pipeline(
            self._config.num_layers, links, dispatcher, tasks, settings.dispatch.timeout_s
        )
        limits = RouterLimits(
            scheduler=settings.scheduler,
            max_micro_batches=settings.max_micro_batches,
            min_micro_batch_tokens=settings.min_micro_batch_tokens,
        )
        pool = BlockPool(settings.cache_size.num_blocks, settings.cache_size.block_size)
        router = Router(self._config, pool, limits, links, pipeline, self._detokenizer_for, tasks)
        self.routers[router_id] = router
        tasks.start_service(router.serve())
        return router

    def publish(self, view: ClusterView) -> None:
        """Gives a view to everybody at once."""
        self.view = view
        for core in self.cores.values():
            core.raise_epoch(view.placement_epoch)
        for router in self.routers.values():
            router.links.update(view)
            router.chain_changed()

    def submit(self, router_id: str, request_id: str, routed: RoutedRequest) -> Heard:
        heard = Heard()
        self.routers[router_id].submit(routed, heard)
        return heard

    def run_until(self, is_so: Callable[[], bool], limit_s: float = 600.0) -> None:
        """Runs, with time going on where nothing is ready, until a condition holds."""
        while not is_so():
            if self.tasks.run_ready():
                continue
            next_s = self.tasks.next_timer_s()
            assert next_s is not None, "nothing will ever happen again"
            assert next_s <= limit_s, f"not so within {limit_s} s of simulated time"
            self.clock.advance_to(next_s)

    def settle(self) -> None:
        """Runs until nothing will ever happen by itself again."""
        while True:
            self.tasks.run_ready()
            next_s = self.tasks.next_timer_s()
            if next_s is None:
                return
            self.clock.advance_to(next_s)

    def check_idle(self) -> None:
        """Asserts that no block, request, batch or call is left."""
        for router in self.routers.values():
            assert router.num_active == 0
            assert not router.scheduler.has_work
            assert router.scheduler.pool.num_held == 0
            router.scheduler.pool.check_integrity()
        for core in self.cores.values():
            assert core.num_waiting == 0

    def _connect(self, router_id: str, member: Member) -> Pending[WorkerLink]:
        way: Pending[WorkerLink] = Pending()
        core = self.cores.get(member.worker_id)
        if core is None or core.incarnation != member.incarnation:
            way.fail(PeerLostError(member.worker_id, "nobody there"))
        elif member.worker_id == router_id and self._settings.has_direct_links:
            way.resolve(DirectLink(core))
        else:
            way.resolve(self.network.connect(core, router_id))
        return way


def all_ended(heard: Mapping[str, Heard]) -> bool:
    return all(one.has_ended or one.has_moved for one in heard.values())
