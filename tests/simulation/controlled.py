"""The real controller over simulated processes."""

from collections.abc import Callable
from functools import partial
from random import Random

from cluster.controller import Controller
from cluster.fleet import Spawned, WorkerDiedError
from cluster.placement import ExpertId, ModelBytes, ShardPlan
from cluster.tasks import Pending
from cluster.view import ClusterView, Member, WorkerState
from tests.memory_cluster import Channel, MemoryCluster, Process
from tests.simulation.cluster import Simulation
from tests.simulation.fake_model import FakeExperts
from tests.simulation.ingress import Ingress
from tests.simulation.scenario import Scenario
from tests.simulation.supervisor import Supervisor
from workers.core import WorkerCore

Load = Callable[[Process, ShardPlan], None]
ExpertsOf = Callable[[Process], FakeExperts]


class SimulatedFleet:
    """Starts processes of the simulation, and talks to them through its network."""

    def __init__(
        self,
        cluster: MemoryCluster,
        controller: Process,
        random: Random,
        load: Load,
        experts_of: ExpertsOf,
    ) -> None:
        self._cluster = cluster
        self._controller = controller
        self._random = random
        self._load = load
        self._experts_of = experts_of
        self._latest: dict[str, Process] = {}
        self._deaths: dict[Process, Pending[None]] = {}
        self._channels: dict[Process, tuple[Channel, Channel]] = {}

    def spawn(self, worker_id: str, incarnation: int) -> Pending[Spawned]:
        spawned: Pending[Spawned] = Pending()

        def come_up() -> None:
            member = Member(
                worker_id=worker_id, incarnation=incarnation, address="", state=WorkerState.LOADING
            )
            process = self._cluster.start_worker(member)
            self._cluster.start_router(worker_id, incarnation)
            self._latest[worker_id] = process
            self._deaths[process] = Pending()
            network = self._cluster.network
            self._channels[process] = (
                Channel(self._controller, process, network),
                Channel(process, self._controller, network),
            )
            spawned.resolve(
                Spawned(
                    address="", router_address="", node_id=worker_id, pid=1, memory_bytes=1 << 40
                )
            )

        self._controller.tasks.call_later(self._random.uniform(0.0, 0.1), come_up)
        return spawned

    def load(self, worker_id: str, shards: ShardPlan) -> Pending[None]:
        return self._tell(worker_id, lambda p: self._load(p, shards), self._random.random() * 0.1)

    def unload(self, worker_id: str, kept: frozenset[ExpertId]) -> Pending[None]:
        def unload(process: Process) -> None:
            self._experts_of(process).held.intersection_update(kept)

        return self._tell(worker_id, unload)

    def publish(self, worker_id: str, view: ClusterView) -> Pending[None]:
        def publish(process: Process) -> None:
            assert process.router is not None
            process.router.links.update(view)
            process.router.chain_changed()

        return self._tell(worker_id, publish)

    def fence(self, worker_id: str, placement_epoch: int) -> Pending[None]:
        def fence(process: Process) -> None:
            assert process.core is not None
            process.core.raise_epoch(placement_epoch)

        return self._tell(worker_id, fence)

    def drain(self, worker_id: str) -> Pending[None]:
        def drain(process: Process) -> None:
            assert process.router is not None
            process.router.drain()

        return self._tell(worker_id, drain)

    def stop(self, worker_id: str) -> Pending[None]:
        stopped: Pending[None] = Pending()
        process = self._latest[worker_id]
        self.on_stop(process)
        stopped.resolve(None)
        return stopped

    def death(self, worker_id: str) -> Pending[None]:
        return self._deaths[self._latest[worker_id]]

    def on_stop(self, process: Process) -> None:
        """Ends a process for good."""
        self._cluster.kill(process)
        self.found_dead(process)

    def found_dead(self, process: Process) -> None:
        """The controller hears of a death, or takes what is frozen for dead."""
        self._deaths[process].resolve(None)

    def _tell(
        self, worker_id: str, act: Callable[[Process], None], takes_s: float = 0.0
    ) -> Pending[None]:
        """Has a process do something; done when it says so, failed when it dies."""
        told: Pending[None] = Pending()
        process = self._latest[worker_id]
        there, back = self._channels[process]

        def done() -> None:
            act(process)
            back.send(lambda: told.resolve(None))

        there.send(lambda: process.tasks.call_later(takes_s, done) and None)
        died = WorkerDiedError(f"{worker_id} died")
        self._deaths[process].when_done(lambda: told.fail(died))
        return told


class ControlledSupervisor(Supervisor):
    """Kills as the stand-in does, and leaves what follows to the controller."""

    def __init__(
        self,
        cluster: MemoryCluster,
        ingress: Ingress,
        random: Random,
        scenario: Scenario,
        load: Load,
        experts_of: ExpertsOf,
    ) -> None:
        super().__init__(cluster, ingress, random)
        self.fleet = SimulatedFleet(cluster, self.process, random, load, experts_of)
        config, wanted = scenario.config, scenario.wanted
        assert wanted is not None
        sizes = ModelBytes(
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            expert_bytes=1,
            attention_layer_bytes=1,
            end_bytes=1,
            kv_layer_bytes_per_token=1,
        )
        self.controller = Controller(sizes, wanted, self.fleet, self.process.tasks)
        self.process.tasks.start_service(self._show_views())
        self.controller.start()

    async def _show_views(self) -> None:
        """Has the ingress, which asks for it now and then, know each new view."""
        to_ingress = Channel(self.process, self._ingress.process, self._cluster.network)
        while True:
            if self.controller.view is not self.view:
                self.view = self._cluster.view = self.controller.view
                to_ingress.send(partial(self._ingress.take_view, self.view))
            await self.controller.changed.wait()

    def close(self) -> None:
        self.controller.close()
        self._cluster.kill(self.process)

    def bump(self) -> None:
        self.controller._touch()

    def move(self, worker_id: str, to: WorkerState) -> None:
        raise NotImplementedError

    def _noticed(self, process: Process) -> None:
        self.num_deaths += 1
        self.fleet.found_dead(process)
        # Who was only frozen is ended for good, some time after it was replaced.
        self._cluster.world.call_later(self._random.uniform(0.0, 6.0), lambda: self._end(process))

    def _end(self, process: Process) -> None:
        self._cluster.kill(process)
        self._ingress.died(process)


class ControlledSimulation(Simulation):
    """A run under the real controller, from an empty cluster on."""

    def run(self) -> None:
        for at_s, num_workers in self.scenario.scalings:
            self._at(at_s, lambda n=num_workers: self._scale(n))
        super().run()

    def _scale(self, num_workers: int) -> None:
        """Grows or shrinks; where that cannot be, everything stays as it is."""
        assert isinstance(self.supervisor, ControlledSupervisor)
        if not self.supervisor.process.is_alive:
            return
        self.log.append(f"{self.cluster.clock.now_s():.4f} scale to {num_workers}")
        self.supervisor.controller.scale(num_workers)

    def _make_supervisor(self, random: Random) -> Supervisor:
        return ControlledSupervisor(
            self.cluster,
            self.ingress,
            random,
            self.scenario,
            self._load_shards,
            lambda process: self.shards[process][0],
        )

    def _load_shards(self, process: Process, shards: ShardPlan) -> None:
        core = process.core
        assert core is not None
        experts, attention = self.shards[process]
        experts.held.update(shards.experts)
        if core.state is WorkerState.LOADING:
            attention = self._make_attention(shards, process, experts)
            core.attach(attention)
            self.shards[process] = (experts, attention)
            core.move(WorkerState.READY)

    def _make_core(self, member: Member, process: Process) -> WorkerCore:
        """Nothing is loaded yet."""
        experts = FakeExperts(self.scenario.config, ())
        experts.spend, experts.compute_s = process.spend, self.scenario.compute_s
        self.shards[process] = (experts, None)
        return WorkerCore(
            member.worker_id,
            member.incarnation,
            experts,
            None,
            process.tasks,
            self.scenario.core_limits,
        )
