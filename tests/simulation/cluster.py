"""Runs a scenario: a whole cluster with ingress and controller, and the faults that happen."""

from collections.abc import Callable
from random import Random

from milliways.model.sampling_params import SampledToken
from milliways.wire.calls import RunExperts
from milliways.wire.errors import DeadlineError, RefusalReason
from milliways.wire.placement import ShardPlan
from milliways.wire.view import Member, WorkerState
from milliways.workers.core import WorkerCore
from tests.memory_cluster import MemoryCluster, Process
from tests.simulation.fake_model import (
    FakeAttention,
    FakeExperts,
    Letters,
    Stream,
    expected_scores,
    expected_streams,
)
from tests.simulation.faults import Fault
from tests.simulation.ingress import Ingress, Journal
from tests.simulation.scenario import Arrival, Drain, Scenario, Strike
from tests.simulation.supervisor import Supervisor

LIMIT_S = 3600.0
Shards = tuple[FakeExperts, FakeAttention | None]


class Simulation:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.shards: dict[Process, Shards] = {}
        self.cluster = MemoryCluster(
            scenario.config,
            scenario.settings,
            self._make_core,
            scenario.view,
            lambda request: Letters(),
        )
        random = Random(scenario.seed)
        self.ingress = Ingress(self.cluster, random)
        self.supervisor = self._make_supervisor(random)
        self.log: list[str] = []
        # Whether a process dies when it computes this call.
        self.is_deadly: Callable[[RunExperts], bool] = lambda call: False
        # Messages delivered until the last request ended.
        self.num_messages = 0

    def run(self) -> None:
        """Runs from the first arrival until nothing moves, then checks the result."""
        for arrival in self.scenario.arrivals:
            self._at(arrival.at_s, lambda a=arrival: self._arrive(a))
        for drain in self.scenario.drains:
            self._at(drain.at_s, lambda d=drain: self._drain(d))
        for strike in self.scenario.strikes:
            self._at(strike.at_s, lambda s=strike: self.strike(s))
        num_requests = len(self.scenario.arrivals)
        self.cluster.run_until(
            lambda: len(self.ingress.journals) == num_requests and self.ingress.is_done, LIMIT_S
        )
        self.num_messages = self.cluster.network.num_delivered
        # Lets the supervisor finish its repairs before it is closed.
        self.cluster.settle()
        self.supervisor.close()
        self.cluster.settle()
        self.check()
        self.cluster.close()

    def check(self) -> None:
        """Asserts that every stream is as expected, and that no batch is left at a shard."""
        for journal in (*self.ingress.journals, *self.ingress.broken):
            wanted = (journal.request, self.scenario.config, self.scenario.draw)
            check_journal(journal, expected_streams(*wanted), expected_scores(*wanted))
        if not self.scenario.strikes and not self.supervisor.num_deaths:
            for process, (_, attention) in self.shards.items():
                assert attention is None or attention.num_batches == 0, process.name

    def _make_supervisor(self, random: Random) -> Supervisor:
        supervisor = Supervisor(self.cluster, self.ingress, random)
        supervisor.restart_s = self.scenario.restart_s
        supervisor.has_takeover = self.scenario.has_takeover
        supervisor.experts_of = lambda process: self.shards[process][0]
        return supervisor

    def strike(self, strike: Strike) -> None:
        """Makes a fault happen, if a process exists that it can hit."""
        random = Random(strike.draw)
        victims = self._victims(strike.fault)
        if not victims:
            return
        victim = random.choice(victims)
        self.log.append(f"{self.cluster.clock.now_s():.4f} {strike.fault.value} {victim.name}")
        match strike.fault:
            case Fault.KILL_EXPERTS | Fault.KILL_ATTENTION | Fault.KILL_ROUTER:
                self.supervisor.kill(victim)
            case Fault.FREEZE:
                victim.spend(random.choice((0.02, 0.2, 5.0)))
            case Fault.REPLACE_FROZEN:
                victim.spend(random.choice((0.02, 0.2, 5.0)))
                self.supervisor.suspect(victim)
            case Fault.STALE_EPOCH:
                assert victim.core is not None
                victim.core.fence.raise_epoch(self.supervisor.view.placement_epoch + 1)
                after_s = random.uniform(0.0, 0.3)
                self.supervisor.process.tasks.call_later(after_s, self.supervisor.bump)
            case Fault.CUT_LINK | Fault.STALL_LINK | Fault.DROP_REPLY:
                self._strike_link(strike.fault, victim, random)
            case Fault.SILENCE:
                self._silence(victim, random)
            case _:
                self._strike_shards(strike.fault, self.shards[victim], random)

    def _victims(self, fault: Fault) -> list[Process]:
        in_chains = {name for chain in self.supervisor.view.chains.values() for name in chain}
        living = [p for p in self.cluster.processes if p.is_alive and (p.core or p.router)]
        match fault:
            case Fault.KILL_ROUTER | Fault.SILENCE:
                return [process for process in living if process.router is not None]
            case Fault.KILL_ATTENTION:
                return [p for p in living if p.core is not None and p.name in in_chains]
            case Fault.KILL_EXPERTS:
                return [p for p in living if p.core is not None and p.router is None]
            case Fault.FREEZE:
                return living
            case _:
                return [process for process in living if process.core is not None]

    def _silence(self, victim: Process, random: Random) -> None:
        """Freezes a router, and hedges its requests, before or after it wakes up."""
        victim.spend(random.choice((0.0, 0.02, 0.2, 5.0)))
        after_s = random.choice((0.0, 0.01, 0.05))
        # Not in a task of the victim, which is frozen as well.
        self.supervisor.process.tasks.call_later(after_s, lambda: self.ingress.hedge(victim))

    def _strike_link(self, fault: Fault, victim: Process, random: Random) -> None:
        links = [link for link in self.cluster.network.links if link.server is victim]
        if not links:
            return
        link = random.choice(links)
        match fault:
            case Fault.CUT_LINK:
                link.cut()
            case Fault.STALL_LINK:
                until_s = self.cluster.clock.now_s() + random.choice((0.02, 0.2, 5.0))
                channels = random.choice(((link.there,), (link.back,), (link.there, link.back)))
                for channel in channels:
                    channel.stalled_until_s = until_s
            case _:
                link.back.num_to_drop += 1

    def _strike_shards(self, fault: Fault, shards: Shards, random: Random) -> None:
        experts, attention = shards
        runner = random.choice([experts, attention or experts])
        match fault:
            case Fault.SLOW:
                runner.compute_s = random.choice((0.02, 0.2, 1.3))
            case Fault.REFUSE_OVERLOADED:
                runner.refusals.extend([RefusalReason.OVERLOADED] * random.randint(1, 30))
            case Fault.REFUSE_EXPIRED:
                runner.refusals.extend([RefusalReason.EXPIRED] * random.randint(1, 5))
            case _:
                assert fault is Fault.FAIL_ONCE
                runner.refusals.append(RefusalReason.FAULT)

    def _arrive(self, arrival: Arrival) -> None:
        journal = self.ingress.submit(arrival.request, arrival.timeout_s)
        if arrival.cancel_after_s is not None:
            tasks = self.ingress.process.tasks
            tasks.call_later(arrival.cancel_after_s, lambda: self.ingress.cancel(journal))

    def _drain(self, drain: Drain) -> None:
        """Drains a worker for a while."""
        member = self.supervisor.view.members[drain.worker_id]
        if member.state is not WorkerState.READY:
            return
        self.supervisor.move(drain.worker_id, WorkerState.DRAINING)
        for process in self._processes_of(member):
            if process.router is not None:
                process.router.drain()
        self._at(self.cluster.clock.now_s() + drain.for_s, lambda: self._resume(member))

    def _resume(self, member: Member) -> None:
        now = self.supervisor.view.members[member.worker_id]
        if now.state is WorkerState.DRAINING:
            self.supervisor.move(member.worker_id, WorkerState.READY)
        for process in self._processes_of(now):
            if process.router is not None:
                process.router.resume()

    def _processes_of(self, member: Member) -> list[Process]:
        """The living processes of a worker and its router."""
        return [
            process
            for process in self.cluster.processes
            if process.is_alive
            and (
                (process.router is not None and process.router.links.router_id == member.worker_id)
                or (process.core is not None and process.core.worker_id == member.worker_id)
            )
        ]

    def _at(self, time_s: float, call: Callable[[], None]) -> None:
        self.cluster.world.call_at(time_s, call)

    def _make_attention(
        self, member: ShardPlan | Member, process: Process, experts: FakeExperts
    ) -> FakeAttention | None:
        if not member.num_layers and not member.has_ends:
            return None
        scenario = self.scenario
        layers = range(member.first_layer, member.first_layer + member.num_layers)
        cache_size = scenario.settings.cache_size
        attention = FakeAttention(scenario.config, layers, member.has_ends, cache_size, experts)
        attention.spend, attention.compute_s = process.spend, scenario.compute_s
        attention.draw = scenario.draw
        process.arrays = attention
        return attention

    def _harm(self, process: Process, call: RunExperts) -> None:
        if self.is_deadly(call):
            # The process must not answer before it is killed.
            process.spend(LIMIT_S)
            self._at(self.cluster.clock.now_s(), lambda: self.supervisor.kill(process))

    def _make_core(self, member: Member, process: Process) -> WorkerCore:
        scenario = self.scenario
        experts = FakeExperts(scenario.config, member.experts)
        attention = self._make_attention(member, process, experts)
        experts.spend, experts.compute_s = process.spend, scenario.compute_s
        experts.harm = lambda call: self._harm(process, call)
        self.shards[process] = (experts, attention)
        core = WorkerCore(
            member.worker_id,
            member.incarnation,
            experts,
            attention,
            process.tasks,
            scenario.core_limits,
        )
        core.fence.move(WorkerState.READY)
        return core


def check_journal(journal: Journal, expected: list[Stream], scores: list[SampledToken]) -> None:
    """The oracle: exactly the tokens of the undisturbed run, or a prefix if the request was cut."""
    actual = journal.streams()
    assert journal.scores == scores[: len(journal.scores)], journal.request_id
    if journal.is_cancelled or isinstance(journal.error, DeadlineError):
        for one, whole in zip(actual, expected, strict=True):
            assert one.tokens == whole.tokens[: len(one.tokens)], journal.request_id
            assert whole.text.startswith(one.text)
        return
    assert journal.error is None, f"{journal.request_id}: {journal.error!r}"
    assert actual == expected, journal.request_id
    assert journal.scores == scores, journal.request_id
