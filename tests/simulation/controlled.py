"""The real controller over simulated processes. If it dies, the next one is started."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import TypeVar

from milliways.cluster.control.controller import Controller
from milliways.cluster.control.fleet import (
    Existing,
    Loaded,
    LoadFailedError,
    Spawned,
    WorkerDiedError,
)
from milliways.cluster.control.targets import ControllerSettings
from milliways.model.manifest import EMPTY_MANIFEST, Manifest
from milliways.model.small_files import SmallFiles
from milliways.runtime.tasks import Pending
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.view import ClusterView, Member, WorkerState
from milliways.workers.core import WorkerCore
from tests.memory_cluster import Channel, MemoryCluster, Process
from tests.simulation.cluster import Simulation
from tests.simulation.fake_model import FakeExperts
from tests.simulation.ingress import Ingress
from tests.simulation.scenario import DiskChange, Scenario
from tests.simulation.supervisor import Supervisor

Load = Callable[[Process, ShardPlan, Manifest], Manifest]
ExpertsOf = Callable[[Process], FakeExperts]
Describe = Callable[[Process], Existing | None]
T = TypeVar("T")

# The digest of every part of the model that is served.
RIGHT = "a" * 32
# As long as the real fleet waits for a worker's description.
DESCRIBE_TIMEOUT_S = 5.0


class SimulatedFleet:
    """A `Fleet` that starts simulated processes and sends to them through the simulated network."""

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

    def spawn(
        self, worker_id: str, incarnation: int, small_files: SmallFiles | None
    ) -> Pending[Spawned]:
        spawned: Pending[Spawned] = Pending()

        def come_up() -> None:
            member = Member(
                worker_id=worker_id, incarnation=incarnation, address="", state=WorkerState.LOADING
            )
            process = self._cluster.start_worker(member)
            self._cluster.start_router(worker_id, incarnation)
            self._latest[worker_id] = process
            self._open_channels(process)
            spawned.resolve(spawned_as(worker_id))

        self._controller.tasks.call_later(self._random.uniform(0.0, 0.1), come_up)
        return spawned

    async def find_existing(
        self, living: Iterable[Process], describe: Describe, end: Callable[[Process], None]
    ) -> list[Existing]:
        """Finds the serving workers of an earlier controller; ends workers that do not serve."""
        found: list[Existing] = []
        for process in living:
            self._open_channels(process)
        for process in living:
            existing = await self._described(process, describe)
            if existing is None:
                end(process)
                continue
            self._latest[existing.worker_id] = process
            found.append(existing)
        return found

    def load(
        self, worker_id: str, shards: ShardPlan, wanted: Manifest, peers: Sequence[Member]
    ) -> Pending[Loaded]:
        def load(process: Process) -> Loaded:
            return Loaded(self._load(process, shards, wanted))

        return self._send(worker_id, load, self._random.random() * 0.1)

    def unload(self, worker_id: str, kept: frozenset[ExpertId]) -> Pending[None]:
        def unload(process: Process) -> None:
            self._experts_of(process).held.intersection_update(kept)

        return self._send(worker_id, unload)

    def publish(self, worker_id: str, view: ClusterView) -> Pending[None]:
        def publish(process: Process) -> None:
            assert process.router is not None
            process.router.links.update(view)
            process.router.chain_changed()

        return self._send(worker_id, publish)

    def fence(self, worker_id: str, placement_epoch: int) -> Pending[None]:
        def fence(process: Process) -> None:
            assert process.core is not None
            process.core.fence.raise_epoch(placement_epoch)

        return self._send(worker_id, fence)

    def drain(self, worker_id: str) -> Pending[None]:
        def drain(process: Process) -> None:
            assert process.router is not None
            process.router.drain()

        return self._send(worker_id, drain)

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
        """Informs the controller that a process died, or is considered dead."""
        # A controller that started later does not know this process.
        if process in self._deaths:
            self._deaths[process].resolve(None)

    def _open_channels(self, process: Process) -> None:
        network = self._cluster.network
        self._deaths[process] = Pending()
        self._channels[process] = (
            Channel(self._controller, process, network),
            Channel(process, self._controller, network),
        )

    async def _described(self, process: Process, describe: Describe) -> Existing | None:
        """A process's description; None if it does not answer or has loaded nothing."""
        answered: Pending[Existing | None] = Pending()
        there, back = self._channels[process]

        def answer() -> None:
            existing = describe(process)
            back.send(lambda: answered.resolve(existing))

        there.send(answer)
        self._deaths[process].when_done(lambda: answered.resolve(None))
        is_in_time = await self._controller.tasks.wait_for(answered, DESCRIBE_TIMEOUT_S)
        return answered.result() if is_in_time else None

    def _send(
        self, worker_id: str, act: Callable[[Process], T], takes_s: float = 0.0
    ) -> Pending[T]:
        """Makes a process run `act`; done when its answer arrives, failed when it dies."""
        done: Pending[T] = Pending()
        process = self._latest[worker_id]
        there, back = self._channels[process]

        def run() -> None:
            try:
                value = act(process)
            except LoadFailedError as error:
                failed = error
                back.send(lambda: done.fail(failed))
            else:
                back.send(lambda: done.resolve(value))

        there.send(lambda: process.tasks.call_later(takes_s, run) and None)
        died = WorkerDiedError(f"{worker_id} died")
        self._deaths[process].when_done(lambda: done.fail(died))
        return done


def spawned_as(worker_id: str) -> Spawned:
    """The answer of a started worker; each is on its own node."""
    return Spawned(address="", router_address="", node_id=worker_id, pid=1, memory_bytes=1 << 40)


def controller_settings(scenario: Scenario) -> ControllerSettings:
    """The controller's settings; the scenario must have some."""
    assert scenario.wanted is not None
    return scenario.wanted


class ControlledSupervisor(Supervisor):
    """Kills processes like `Supervisor`, and leaves their replacement to the real controller.

    When the controller dies, the next one starts with the last view that the ingress knows.
    """

    def __init__(
        self,
        cluster: MemoryCluster,
        ingress: Ingress,
        random: Random,
        scenario: Scenario,
        load: Load,
        experts_of: ExpertsOf,
        describe: Describe,
    ) -> None:
        super().__init__(cluster, ingress, random)
        self.experts_of = experts_of
        self._load = load
        self._describe = describe
        self._scenario = scenario
        self._given_up: set[Process] = set()
        self._start_controller()
        self.process.tasks.start_service(self._show_views())
        self.controller.start()

    def kill(self, process: Process) -> None:
        if process is not self.process:
            super().kill(process)
        elif process.is_alive:
            self.num_deaths += 1
            self._cluster.kill(process)
            # Answers on their way to the ingress are lost.
            self._to_ingress.is_cut = True
            after_s = self._random.uniform(0.0, self.restart_s)
            self._cluster.world.call_later(after_s, self._begin_again)

    def _start_controller(self) -> None:
        """Creates the controller and its fleet in the current process."""
        config = self._scenario.config
        self.fleet = SimulatedFleet(
            self._cluster, self.process, self._random, self._load, self.experts_of
        )
        self._to_ingress = Channel(self.process, self._ingress.process, self._cluster.network)
        sizes = ModelBytes(
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            expert_bytes=1,
            attention_layer_bytes=1,
            end_bytes=1,
            kv_layer_bytes_per_token=1,
        )
        settings = controller_settings(self._scenario)
        self.controller = Controller(sizes, settings, self.fleet, self.process.tasks)

    def _restart_ingress(self) -> None:
        self._ingress.start_again()
        self._to_ingress = Channel(self.process, self._ingress.process, self._cluster.network)
        # A dead controller sends nothing; the next one will send its view.
        self._to_ingress.send(partial(self._ingress.take_view, self.view))

    def _begin_again(self) -> None:
        self.process = self._cluster.start_process("controller")
        self._start_controller()
        self.process.tasks.start_service(self._adopt(self._ingress.view))

    async def _adopt(self, known: ClusterView) -> None:
        living = [
            process
            for process in self._cluster.processes
            if process.is_alive and process.core is not None and process not in self._given_up
        ]
        existing = await self.fleet.find_existing(living, self._describe, self._end)
        self.controller.start(existing, known)
        await self._show_views()

    async def _show_views(self) -> None:
        """Sends each new view to the ingress."""
        while True:
            if self.controller.view is not self.view:
                self.view = self._cluster.view = self.controller.view
                self._to_ingress.send(partial(self._ingress.take_view, self.view))
            await self.controller.changed.wait()

    def close(self) -> None:
        self.controller.close()
        self._cluster.kill(self.process)

    def bump(self) -> None:
        self.controller.overtake(self.controller.view.placement_epoch + 1)

    def move(self, worker_id: str, to: WorkerState) -> None:
        raise NotImplementedError

    def _noticed(self, process: Process) -> None:
        self.num_deaths += 1
        self._given_up.add(process)
        self.fleet.found_dead(process)
        # A process that was only frozen is killed some time after it was replaced.
        self._cluster.world.call_later(self._random.uniform(0.0, 6.0), lambda: self._end(process))

    def _end(self, process: Process) -> None:
        self._cluster.kill(process)
        self._ingress.died(process)


class ControlledSimulation(Simulation):
    """A run under the real controller; it begins with an empty cluster."""

    def __init__(self, scenario: Scenario) -> None:
        # The shards that each process loaded last.
        self.plans: dict[Process, ShardPlan] = {}
        # The digests of all that each process has loaded.
        self.found: dict[Process, Manifest] = {}
        # The bytes on the disk of each worker, where they are not the right ones; None: unreadable.
        self.disks: dict[str, str | None] = {}
        super().__init__(scenario)

    def run(self) -> None:
        for change in self.scenario.disks:
            self._at(change.at_s, lambda c=change: self._change_disk(c))
        for at_s, num_workers in self.scenario.scalings:
            self._at(at_s, lambda n=num_workers: self._scale(n))
        super().run()

    def check(self) -> None:
        """Checks also that all workers are back, and that all processes know the last view."""
        super().check()
        assert isinstance(self.supervisor, ControlledSupervisor)
        controller = self.supervisor.controller
        assert controller.is_complete
        views = [self.ingress.view, *(r.links.view for r in self.cluster.routers.values())]
        assert all(view == controller.view for view in views)
        if not self.scenario.scalings:
            states = [record.state for record in controller.workers.values()]
            assert states == [WorkerState.READY] * controller_settings(self.scenario).num_workers

    def _change_disk(self, change: DiskChange) -> None:
        # What the first load finds is the model, whatever it is.
        if self.ingress.view.manifest_is_whole:
            self.log.append(f"{self.cluster.clock.now_s():.4f} disk of {change.worker_id} changes")
            self.disks[change.worker_id] = change.content

    def _scale(self, num_workers: int) -> None:
        """Scales the cluster; a scaling that is impossible changes nothing."""
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
            self._describe,
        )

    def _load_shards(self, process: Process, shards: ShardPlan, wanted: Manifest) -> Manifest:
        """Loads what can be read and is not of another model, expert by expert."""
        core = process.core
        assert core is not None
        experts, attention = self.shards[process]
        found = self._read(process, core.worker_id, shards)
        if differing := wanted.differing(found):
            raise LoadFailedError(f"{process.name} cannot load: {differing[0]} is another")
        self.found[process] = self.found.get(process, EMPTY_MANIFEST).with_all(found)
        if self.disks.get(core.worker_id, RIGHT) != RIGHT:
            experts.wrong |= shards.experts - experts.held
        experts.held.update(shards.experts)
        self.plans[process] = shards
        if core.state is WorkerState.LOADING:
            attention = self._make_attention(shards, process, experts)
            core.attach(attention)
            self.shards[process] = (experts, attention)
            core.fence.move(WorkerState.READY)
        return self.found[process]

    def _read(self, process: Process, worker_id: str, shards: ShardPlan) -> Manifest:
        """The digests of what a process reads of its shards that it does not hold yet."""
        missing = shards.experts - self.shards[process][0].held
        disk = self.disks.get(worker_id, RIGHT)
        if disk is None and missing:
            raise LoadFailedError(f"{worker_id} cannot load: a file is missing")
        return Manifest({f"expert {e.layer}.{e.expert}": disk or RIGHT for e in missing})

    def _describe(self, process: Process) -> Existing | None:
        """All that a new controller has to know; None where it has to be started anew."""
        core, router = process.core, process.router
        assert core is not None and router is not None
        if core.state is not WorkerState.READY:
            return None
        held = frozenset(self.shards[process][0].held)
        return Existing(
            worker_id=core.worker_id,
            incarnation=core.incarnation,
            spawned=spawned_as(core.worker_id),
            shards=replace(self.plans[process], experts=held),
            held=held,
            view=router.links.view,
            manifest=self.found[process],
        )

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
