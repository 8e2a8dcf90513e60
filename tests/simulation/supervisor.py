"""Stands in for the controller: notices deaths, restarts workers, and publishes views.

A worker that dies is LOST in a new view. After a while it restarts with the next incarnation and
the same shards. Meanwhile survivors may take over experts that no worker holds. Each process
receives a view after its own delay.
"""

import dataclasses
from collections.abc import Callable
from random import Random

from milliways.wire.placement import ExpertId
from milliways.wire.view import ClusterView, Member, WorkerState
from tests.memory_cluster import Channel, MemoryCluster, Process, take_view
from tests.simulation.fake_model import FakeExperts
from tests.simulation.ingress import Ingress


class Supervisor:
    """Owns the view.

    *Invariant:* each published view has a higher epoch than the one before.
    """

    def __init__(self, cluster: MemoryCluster, ingress: Ingress, random: Random) -> None:
        self.process = cluster.start_process("controller")
        self.view = cluster.view
        self.num_deaths = 0
        self.restart_s = 0.2
        self.has_takeover = True
        self.experts_of: Callable[[Process], FakeExperts]
        self._cluster = cluster
        self._ingress = ingress
        self._random = random
        self._channels: dict[Process, Channel] = {}

    def close(self) -> None:
        """Starts nothing from now on."""

    def kill(self, process: Process) -> None:
        """Kills a process; its death is noticed later."""
        if not process.is_alive:
            return
        if process is self._ingress.process:
            self.num_deaths += 1
            self._ingress.die()
            after_s = self._random.uniform(0.0, self.restart_s)
            self._cluster.world.call_later(after_s, self._restart_ingress)
            return
        self._cluster.kill(process)
        self._ingress.died(process)
        after_s = self._cluster.network.detection_s()
        self.process.tasks.call_later(after_s, lambda: self._noticed(process))

    def suspect(self, process: Process) -> None:
        """Treats a process as dead that may only be frozen: two incarnations may then run."""
        self._noticed(process)

    def publish(self, members: dict[str, Member]) -> None:
        """Publishes a view with these members; it reaches each process after a delay."""
        self.view = dataclasses.replace(
            self.view, placement_epoch=self.view.placement_epoch + 1, members=members
        )
        self._cluster.view = self.view
        for process in self._cluster.processes:
            if process.is_alive and process is not self.process:
                self._tell(process, self.view)

    def bump(self) -> None:
        """Publishes the same members with a new epoch."""
        self.publish(dict(self.view.members))

    def move(self, worker_id: str, to: WorkerState) -> None:
        """Publishes another state of a worker."""
        member = self.view.members[worker_id]
        self.publish({**self.view.members, worker_id: dataclasses.replace(member, state=to)})

    def _tell(self, process: Process, view: ClusterView) -> None:
        channel = self._channels.setdefault(
            process, Channel(self.process, process, self._cluster.network)
        )
        if process is self._ingress.process:
            channel.send(lambda: self._ingress.take_view(view))
        else:
            channel.send(lambda: take_view(process, view))

    def _noticed(self, process: Process) -> None:
        self.num_deaths += 1
        core = process.core
        if core is None:
            assert process.router is not None
            links = process.router.links
            incarnation = links.incarnation + 1
            self._later(lambda: self._restart_router(links.router_id, incarnation))
            return
        member = self.view.members[core.worker_id]
        if member.incarnation != core.incarnation or member.state is WorkerState.LOST:
            return
        lost = dataclasses.replace(member, state=WorkerState.LOST)
        self.publish({**self.view.members, core.worker_id: lost})
        if self.has_takeover:
            self._later(self._take_over)
        self._later(lambda: self._restart_worker(core.worker_id))

    def _later(self, call: Callable[[], None]) -> None:
        self.process.tasks.call_later(self._random.uniform(0.0, self.restart_s), call)

    def _restart_ingress(self) -> None:
        self._ingress.start_again()
        self._tell(self._ingress.process, self.view)

    def _restart_router(self, router_id: str, incarnation: int) -> None:
        self._tell(self._cluster.start_router(router_id, incarnation), self.view)

    def _restart_worker(self, worker_id: str) -> None:
        member = self.view.members[worker_id]
        member = dataclasses.replace(
            member, incarnation=member.incarnation + 1, state=WorkerState.READY
        )
        self._cluster.start_worker(member)
        if worker_id in self.view.chains and self._cluster.settings.has_direct_links:
            self._cluster.start_router(worker_id, member.incarnation)
        self.publish({**self.view.members, worker_id: member})

    def _take_over(self) -> None:
        """Gives each expert that no worker holds to a living worker."""
        members = dict(self.view.members)
        living = sorted(name for name, member in members.items() if member.can_compute)
        wanted = {expert for member in members.values() for expert in member.experts}
        lost = sorted(e for e in wanted if not self.view.holders(e))
        if not lost or not living:
            return
        for expert in lost:
            self._give(members, self._random.choice(living), expert)
        self.publish(members)

    def _give(self, members: dict[str, Member], worker_id: str, expert: ExpertId) -> None:
        member = members[worker_id]
        process = self._cluster.workers[(worker_id, member.incarnation)]
        self.experts_of(process).held.add(expert)
        members[worker_id] = dataclasses.replace(member, experts=member.experts | {expert})
