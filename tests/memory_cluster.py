"""A cluster in one thread: processes, routers, workers and the messages between them.

Messages take time on a fake clock; a seed decides their order. Cores, dispatch, pipeline and router
are the production code. Only links, clock and processes are fakes. A process can be busy, freeze or
die. A stream can stall or break, and each end notices after a realistic delay.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from milliways.model.block_pool import BlockPool
from milliways.model.config import ModelConfig
from milliways.model.runner import CacheSize
from milliways.router.block_copies import BlockArrays
from milliways.router.dispatch import Dispatcher
from milliways.router.limits import DispatchLimits, RouterLimits, SchedulerLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.pipeline import Pipeline
from milliways.router.requests.admission import DetokenizerFor, RoutedRequest
from milliways.router.router import Router
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.calls import Call, Fence, Result
from milliways.wire.errors import PeerLostError
from milliways.wire.links import WorkerLink
from milliways.wire.view import ClusterView, Member
from milliways.workers.core import WorkerCore
from tests.memory_exchange import MemoryNode, attach_exchange, own_link
from tests.recording import Recording


class Process:
    """Everything that shares a thread, and so computes, freezes and dies together."""

    def __init__(self, name: str, clock: FakeClock) -> None:
        self.name = name
        self.tasks = Tasks(clock)
        self.inbox: deque[Callable[[], None]] = deque()
        self.is_alive = True
        self.core: WorkerCore | None = None
        self.router: Router | None = None
        # The keys and values of the router's blocks, if blocks are copied.
        self.arrays: BlockArrays | None = None
        # With compiled steps: the native side.
        self.node: MemoryNode | None = None
        self._clock = clock
        self._asleep_until_s = 0.0

    def now_s(self) -> float:
        """The time at which the process is no longer busy."""
        return max(self._clock.now_s(), self._asleep_until_s)

    def spend(self, seconds: float) -> None:
        """Makes the process busy for longer: messages and tasks wait."""
        self._asleep_until_s = self.now_s() + seconds

    def run(self, now_s: float) -> bool:
        """Handles messages and runs tasks, unless busy; returns whether anything ran."""
        if not self.is_alive or self._asleep_until_s > now_s:
            return False
        has_run = bool(self.inbox)
        while self.inbox:
            self.inbox.popleft()()
        return self.tasks.run_ready() or has_run

    def next_s(self, now_s: float) -> float | None:
        """The time of its next own action, if there is one."""
        if not self.is_alive:
            return None
        timer_s = self.tasks.next_timer_s()
        if self._asleep_until_s > now_s:
            return self._asleep_until_s
        return timer_s

    def die(self) -> None:
        """Ends at once: none of its pending work has an effect."""
        self.is_alive = False
        self.inbox.clear()
        self.tasks.close()


class Channel:
    """One direction of a stream: messages arrive in order, each after a delay."""

    def __init__(self, sender: Process, receiver: Process, network: "Network") -> None:
        self.stalled_until_s = 0.0
        self.num_to_drop = 0
        self.is_cut = False
        self._sender = sender
        self._receiver = receiver
        self._network = network
        self._last_s = 0.0

    def send(self, deliver: Callable[[], None], about: Call | None = None) -> None:
        """Runs `deliver` at the other end after a delay, unless the channel is cut before."""
        if not self._sender.is_alive or self.is_cut:
            return
        if self.num_to_drop:
            self.num_to_drop -= 1
            return
        there_s = max(self._sender.now_s(), self.stalled_until_s) + self._network.delay_s()
        self._last_s = max(self._last_s, there_s)
        self._network.tasks.call_at(self._last_s, lambda: self._arrive(deliver, about))

    def _arrive(self, deliver: Callable[[], None], about: Call | None) -> None:
        if self.is_cut or not self._receiver.is_alive:
            return
        self._network.delivered(self._receiver, about)
        if self._receiver.is_alive:
            self._receiver.inbox.append(deliver)


class Network:
    """Carries messages with a delay that a seed draws."""

    def __init__(self, tasks: Tasks, seed: int = 0, delay_s_max: float = 0.002) -> None:
        self.tasks = tasks
        self.random = Random(seed)
        self.links: list[MemoryLink] = []
        self._opening: list[tuple[Process, Pending[WorkerLink]]] = []
        self.num_delivered = 0
        # Called before each message arrives; tests count messages and kill processes here.
        self.on_delivery: Callable[[Process], None] | None = None
        # The call that this message carries or answers, if any.
        self.arriving: Call | None = None
        self._delay_s_max = delay_s_max

    def delay_s(self) -> float:
        return self.random.uniform(0.0, self._delay_s_max)

    def detection_s(self) -> float:
        """The delay until the end of a stream is noticed."""
        return self.random.uniform(0.0, 5 * self._delay_s_max)

    def delivered(self, receiver: Process, about: Call | None) -> None:
        self.num_delivered += 1
        self.arriving = about
        if self.on_delivery is not None:
            self.on_delivery(receiver)

    def connect(self, client: Process, server: Process, router_id: str) -> Pending[WorkerLink]:
        """Opens a link in one round trip; it stays pending while the other side is frozen."""
        opening: Pending[WorkerLink] = Pending()
        self._opening.append((server, opening))
        opening.when_done(lambda: self._opening.remove((server, opening)))
        there, back = Channel(client, server, self), Channel(server, client, self)

        def accept() -> None:
            if not client.is_alive:
                return
            link = MemoryLink(client, server, router_id, there, back, self)
            link.opening = opening
            self.links.append(link)
            back.send(lambda: opening.resolve(link))

        there.send(accept)
        return opening

    def died(self, process: Process) -> None:
        """Breaks all streams of a dead process; each other end notices after its own delay."""
        for link in list(self.links):
            if link.client is process:
                link.forget_client(self.detection_s())
            elif link.server is process:
                link.lose_server(self.detection_s())
        for server, opening in list(self._opening):
            if server is process:
                lost = PeerLostError(process.name, "died while a link to it was opened")
                self.tasks.call_later(self.detection_s(), lambda o=opening, e=lost: o.fail(e))


class MemoryLink:
    """A link to a core through the network."""

    transport = "memory"
    is_local = False

    def __init__(
        self,
        client: Process,
        server: Process,
        router_id: str,
        there: Channel,
        back: Channel,
        network: Network,
    ) -> None:
        self.client = client
        self.server = server
        self.there = there
        self.back = back
        self.exchange_link = client.node.open_link(self) if client.node is not None else 0
        self.opening: Pending[WorkerLink] = Pending()
        self._router_id = router_id
        self._network = network
        self._waiting: list[Pending[Result]] = []
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Number of calls without an answer."""
        return len(self._waiting)

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        answer: Pending[Result] = Pending()
        if self._is_closed:
            answer.fail(PeerLostError(self.server.name, "closed"))
        else:
            self._waiting.append(answer)
            answer.when_done(lambda: self._waiting.remove(answer))
            self.there.send(lambda: self._arrive(call, fence, answer), call)
        return answer

    def close(self) -> None:
        """Closes the link. Messages sent before still arrive, as from a socket's buffer."""
        if not self._is_closed:
            self._is_closed = True
            self.there.send(self._client_gone)
            self._fail_waiting("closed")

    def cut(self) -> None:
        """Breaks the stream: messages on the way are lost, and each end notices later."""
        self.lose_server(self._network.detection_s())
        self.forget_client(self._network.detection_s())

    def lose_server(self, after_s: float) -> None:
        """Breaks the stream; the router's end notices after a delay."""
        self.there.is_cut = self.back.is_cut = True
        notice = Channel(self.client, self.client, self._network)
        self._network.tasks.call_later(after_s, lambda: notice.send(self._break_off))

    def forget_client(self, after_s: float) -> None:
        """Breaks the stream; the worker's end notices after a delay."""
        self.there.is_cut = self.back.is_cut = True
        notice = Channel(self.server, self.server, self._network)
        self._network.tasks.call_later(after_s, lambda: notice.send(self._client_gone))

    def _break_off(self) -> None:
        self._is_closed = True
        self.opening.fail(PeerLostError(self.server.name, "the stream broke at once"))
        if not self.server.is_alive:
            self._forget()
        self._fail_waiting("the stream broke")

    def _fail_waiting(self, why: str) -> None:
        if self.client.node is not None:
            self.client.node.close_link(self.exchange_link)
        for answer in list(self._waiting):
            answer.fail(PeerLostError(self.server.name, why))

    def _forget(self) -> None:
        if self in self._network.links:
            self._network.links.remove(self)

    def _client_gone(self) -> None:
        self._forget()
        if self.server.core is not None:
            self.server.core.router_gone(self._router_id)

    def _arrive(self, call: Call, fence: Fence, answer: Pending[Result]) -> None:
        core = self.server.core
        if core is not None:
            core.submit(call, fence, lambda result: self._reply(call, answer, result))

    def _reply(self, call: Call, answer: Pending[Result], result: Result) -> None:
        self.back.send(lambda: answer.resolve(result), call)


class DirectLink:
    """A link to the core of the same process."""

    transport = "direct"
    is_local = True
    exchange_link = 0

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        answer: Pending[Result] = Pending()
        answer.resolve(self._core.direct.compute_now(call, fence))
        return answer

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Settings of routers and of the network."""

    cache_size: CacheSize
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_micro_batches: int = 2
    min_micro_batch_tokens: int = 1
    dispatch: DispatchLimits = field(default_factory=DispatchLimits)
    seed: int = 0
    delay_s_max: float = 0.002
    # Whether a router runs in the process of the worker with the same id, and calls it directly.
    has_direct_links: bool = True
    # Whether routers with direct links copy their KV blocks to one another.
    kv_standby: bool = False
    # Whether routers with direct links compute compiled steps.
    has_exchange: bool = False


class MemoryCluster:
    """Owns the clock and all processes, and runs them until a condition holds.

    *Invariant:* `processes` holds every process ever started, dead ones included.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: ClusterSettings,
        make_core: Callable[[Member, Process], WorkerCore],
        view: ClusterView,
        detokenizer_for: DetokenizerFor,
    ) -> None:
        self.clock = FakeClock()
        self.world = Tasks(self.clock)
        self.network = Network(self.world, settings.seed, settings.delay_s_max)
        self.view = view
        self.config = config
        self.settings = settings
        # Dead processes stay in the list, so that tests can inspect them.
        self.processes: list[Process] = []
        self.workers: dict[tuple[str, int], Process] = {}
        self._make_core = make_core
        self._detokenizer_for = detokenizer_for
        for member in view.members.values():
            self.start_worker(member)
        for router_id in view.chains:
            self.start_router(router_id, view.members[router_id].incarnation)
        self.publish(view)

    @property
    def routers(self) -> dict[str, Router]:
        """The living routers, each with its latest incarnation."""
        living = (p.router for p in self.processes if p.is_alive and p.router is not None)
        return {router.links.router_id: router for router in living}

    @property
    def cores(self) -> list[WorkerCore]:
        return [p.core for p in self.processes if p.is_alive and p.core is not None]

    def start_process(self, name: str) -> Process:
        process = Process(name, self.clock)
        self.processes.append(process)
        return process

    def start_worker(self, member: Member) -> Process:
        """Starts an incarnation of a worker; it is ready at once."""
        process = self.start_process(member.worker_id)
        self.workers[(member.worker_id, member.incarnation)] = process
        process.core = self._make_core(member, process)
        process.tasks.start_service(process.core.serve())
        return process

    def start_router(self, router_id: str, incarnation: int) -> Process:
        """Starts an incarnation of a router, in its worker's process or in its own."""
        settings = self.settings
        if settings.has_direct_links:
            process = self.workers[(router_id, incarnation)]
        else:
            process = self.start_process(f"router of {router_id}")
        tasks = process.tasks
        links = LinkTable(
            router_id, incarnation, lambda member: self._connect(process, router_id, member), tasks
        )
        dispatcher = Dispatcher(links, settings.dispatch, tasks)
        exchange, timeout_s = None, settings.dispatch.timeout_s
        if settings.has_exchange:
            exchange = attach_exchange(process, links, dispatcher, self.config)
        pipeline = Pipeline(self.config.num_layers, links, dispatcher, tasks, timeout_s, exchange)
        limits = RouterLimits(
            scheduler=settings.scheduler,
            max_micro_batches=settings.max_micro_batches,
            min_micro_batch_tokens=settings.min_micro_batch_tokens,
        )
        pool = BlockPool(settings.cache_size.num_blocks, settings.cache_size.block_size)
        has_copies = settings.kv_standby and settings.has_direct_links
        router = process.router = Router(
            self.config,
            pool,
            limits,
            links,
            pipeline,
            self._detokenizer_for,
            tasks,
            (lambda: process.arrays) if has_copies else None,
        )
        if has_copies:
            assert process.core is not None
            process.core.attach_copies(lambda call, reply: reply(router.store_blocks(call)))
        tasks.start_service(process.router.serve())
        return process

    def publish(self, view: ClusterView) -> None:
        """Gives a view to all processes at once."""
        self.view = view
        for process in self.processes:
            if process.is_alive:
                take_view(process, view)

    def kill(self, process: Process) -> None:
        """Ends a process; the others notice later."""
        if process.is_alive:
            process.die()
            self.network.died(process)

    def submit(self, router_id: str, request_id: str, routed: RoutedRequest) -> Recording:
        recording = Recording()
        self.routers[router_id].submit(routed, recording)
        return recording

    def run_until(self, holds: Callable[[], bool], limit_s: float = 600.0) -> None:
        """Runs until a condition holds; advances the clock when nothing is ready."""
        while not holds():
            if not self._run_ready():
                next_s = self._next_s()
                assert next_s is not None, "nothing will ever happen again"
                assert next_s <= limit_s, f"not so within {limit_s} s of simulated time"
                self.clock.advance_to(next_s)

    def settle(self) -> None:
        """Runs until no message and no timer is left."""
        while True:
            if not self._run_ready():
                if (next_s := self._next_s()) is None:
                    return
                self.clock.advance_to(next_s)

    def close(self) -> None:
        """Closes all links and ends all processes; asserts that nothing is left over."""
        self.network.on_delivery = None
        living = self._living()
        for process in living:
            if process.router is not None:
                process.router.links.close()
        self.settle()
        self.check_idle()
        for process in living:
            parts = (process.core, process.router, process.node, process.node)
            num_services = sum(part is not None for part in parts)
            assert process.tasks.num_alive == num_services, process.name
            process.tasks.close()
            assert process.tasks.num_alive == 0
        open_links = [link for link in self.network.links if link.server.is_alive]
        assert [link.server.name for link in open_links] == []

    def check_idle(self) -> None:
        """Asserts that no block, request, batch or call is left."""
        for router in self.routers.values():
            assert router.num_active == 0, router.links.router_id
            assert not router.scheduler.has_work
            assert router.scheduler.pool.num_held == 0
            router.scheduler.pool.check_integrity()
        for core in self.cores:
            assert core.num_waiting == 0, core.worker_id
        assert not any(link.num_waiting and link.client.is_alive for link in self.network.links)

    def _run_ready(self) -> bool:
        has_run = self.world.run_ready()
        now_s = self.clock.now_s()
        # A copy, because a process may start others.
        for process in self._living():
            has_run |= process.run(now_s)
        return has_run

    def _next_s(self) -> float | None:
        now_s = self.clock.now_s()
        times = [process.next_s(now_s) for process in self._living()]
        times.append(self.world.next_timer_s())
        return min((time_s for time_s in times if time_s is not None), default=None)

    def _living(self) -> list[Process]:
        return [process for process in self.processes if process.is_alive]

    def _connect(self, client: Process, router_id: str, member: Member) -> Pending[WorkerLink]:
        server = self.workers.get((member.worker_id, member.incarnation))
        opening: Pending[WorkerLink] = Pending()
        if server is client and client.core is not None:
            opening.resolve(own_link(client) or DirectLink(client.core))
        elif server is not None and server.is_alive:
            return self.network.connect(client, server, router_id)
        else:
            opening.fail(PeerLostError(member.worker_id, "does not exist"))
        return opening


def take_view(process: Process, view: ClusterView) -> None:
    """Handles a new view in a process."""
    if process.core is not None:
        process.core.fence.raise_epoch(view.placement_epoch)
    if process.router is not None:
        process.router.links.update(view)
        process.router.chain_changed()
