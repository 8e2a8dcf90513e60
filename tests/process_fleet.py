"""A cluster of real worker processes under the real controller, but without Ray.

async with process_cluster(hosts, config, settings, model) as cluster:
    async for event in cluster.source.generate(...)
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from milliways.cluster.control.controller import Controller
from milliways.cluster.control.fleet import (
    Loaded,
    LoadFailedError,
    Spawned,
    WorkerDiedError,
)
from milliways.cluster.control.targets import ControllerSettings
from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.cluster.settings.config import ClusterConfig
from milliways.model.errors import CheckpointError
from milliways.model.manifest import Manifest
from milliways.model.small_files import SmallFiles
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent
from milliways.runtime.async_tasks import AsyncTasks
from milliways.runtime.tasks import Pending
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.status import ProcessStatus
from milliways.wire.view import ClusterView, Member, WorkerState
from tests.worker_host import WorkerHost

MEMORY_BYTES = 1 << 40
_SEED = 1
_OF_FILES = tuple(kind.__name__ for kind in CheckpointError.__subclasses__())
TIMEOUT_S = 60.0


class HostPool:
    """Idle processes for workers, each with `num_devices` devices, and those in use."""

    def __init__(self, folder: Path, num_devices: int = 1) -> None:
        self._folder = folder
        self._num_devices = num_devices
        self._idle: list[WorkerHost] = []
        self._taken: list[WorkerHost] = []
        self._gone: dict[int, Callable[[], None]] = {}

    def take(self, gone: Callable[[], None]) -> WorkerHost:
        """An idle process, or a new one; `gone` is called when it dies, in any thread."""
        host = self._idle.pop() if self._idle else self._start()
        self._taken.append(host)
        self._gone[host.pid] = gone
        return host

    def give_back(self, host: WorkerHost) -> None:
        if host in self._taken:
            self._taken.remove(host)
            self._gone.pop(host.pid, None)
            self._idle.append(host)

    def discard(self, host: WorkerHost) -> None:
        """Ends a process in use."""
        self._taken.remove(host)
        self._gone.pop(host.pid, None)
        host.end()

    def close(self) -> None:
        self._gone.clear()
        for host in self._idle + self._taken:
            host.end()
        self._idle.clear()
        self._taken.clear()

    def _start(self) -> WorkerHost:
        return WorkerHost(self._folder, self._on_gone, self._num_devices)

    def _on_gone(self, host: WorkerHost) -> None:
        call = self._gone.pop(host.pid, None)
        if call is not None:
            call()


class ProcessFleet:
    """A `Fleet` of worker processes; call it in the event loop of its `AsyncTasks`."""

    def __init__(
        self, hosts: HostPool, config: ClusterConfig, shell: AsyncTasks, sizes: ModelBytes
    ) -> None:
        self._hosts = hosts
        self._sizes = sizes
        self._config = config
        self._shell = shell
        self._loop = asyncio.get_running_loop()
        self._workers: dict[str, WorkerHost] = {}
        self._deaths: dict[str, Pending[None]] = {}

    def spawn(
        self, worker_id: str, incarnation: int, small_files: SmallFiles | None
    ) -> Pending[Spawned]:
        death: Pending[None] = Pending()
        self._deaths[worker_id] = death
        dead = self._workers.pop(worker_id, None)
        if dead is not None:
            self._hosts.discard(dead)
        self._workers[worker_id] = self._hosts.take(lambda: self._soon(lambda: death.resolve(None)))
        # Each worker counts as a separate node.
        return self._call(
            worker_id,
            "spawn",
            self._config,
            worker_id,
            incarnation,
            self._sizes,
            small_files,
            change=lambda s: replace(s, node_id=worker_id, memory_bytes=MEMORY_BYTES),
        )

    def missing_resource(self, worker_id: str) -> str:
        return "its process to start"

    def load(
        self, worker_id: str, shards: ShardPlan, wanted: Manifest, peers: Sequence[Member]
    ) -> Pending[Loaded]:
        return self._call(worker_id, "load", shards, 0, wanted, peers)

    def unload(self, worker_id: str, kept: frozenset[ExpertId]) -> Pending[None]:
        return self._call(worker_id, "unload", kept)

    def publish(self, worker_id: str, view: ClusterView) -> Pending[None]:
        return self._call(worker_id, "publish", view)

    def fence(self, worker_id: str, placement_epoch: int) -> Pending[None]:
        return self._call(worker_id, "fence", placement_epoch)

    def drain(self, worker_id: str) -> Pending[None]:
        return self._call(worker_id, "drain")

    def stop(self, worker_id: str) -> Pending[None]:
        host = self._workers.pop(worker_id)
        stopped: Pending[None] = Pending()

        def then(value: Any, error: str) -> None:
            if not error:
                self._hosts.give_back(host)
            self._soon(lambda: stopped.resolve(None))

        host.call("stop", then=then)
        return stopped

    def death(self, worker_id: str) -> Pending[None]:
        return self._deaths[worker_id]

    def status(self, worker_id: str) -> Pending[ProcessStatus]:
        """A worker's status."""
        return self._call(worker_id, "status")

    def kill(self, worker_id: str) -> None:
        """Kills a worker as the operating system does when memory runs out."""
        os.kill(self._workers[worker_id].pid, signal.SIGKILL)

    @property
    def worker_ids(self) -> Sequence[str]:
        return sorted(self._workers)

    def _call(
        self,
        worker_id: str,
        method: str,
        *arguments: Any,
        change: Callable[[Any], Any] = lambda value: value,
    ) -> Pending[Any]:
        answer: Pending[Any] = Pending()

        def then(value: Any, error: str) -> None:
            if error:
                # As the fleet on Ray tells them apart.
                is_of_files = error.startswith(("CheckpointError", *_OF_FILES))
                kind = LoadFailedError if is_of_files else WorkerDiedError
                self._soon(lambda: answer.fail(kind(f"{worker_id} cannot load: {error}")))
            else:
                self._soon(lambda: answer.resolve(change(value)))

        self._workers[worker_id].call(method, *arguments, then=then)
        return answer

    def _soon(self, settle: Callable[[], None]) -> None:
        """Settles a result in the event loop's thread."""

        def run() -> None:
            settle()
            self._shell.kick()

        self._loop.call_soon_threadsafe(run)


class ProcessCluster:
    """Controller, workers, and a source over their routers; it is also the router directory."""

    def __init__(
        self,
        hosts: HostPool,
        config: ClusterConfig,
        settings: ControllerSettings,
        model: ModelBytes,
    ) -> None:
        self.shell = AsyncTasks()
        self.fleet = ProcessFleet(hosts, config, self.shell, model)
        self.controller = Controller(model, settings, self.fleet, self.shell.tasks)
        # With this seed the first of three idle routers gets the first request.
        self.source = RouterSource(self, random=Random(_SEED))

    def routers(self) -> Sequence[RouterInfo]:
        view = self.controller.view
        return [RouterInfo(m.worker_id, m.router_address) for m in view.routers()]

    async def changed(self) -> None:
        await self.shell.wait(self.controller.changed.wait())

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Waits until a condition on the controller holds."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not holds():
                    await self.changed()
        except TimeoutError:
            waits = {r.worker_id: (r.state, r.waits_for) for r in self.controller.workers.values()}
            raise AssertionError(f"not so: {what}: {waits}, {self.controller.failure}") from None

    async def until_ready(self) -> None:
        """Waits until all workers are ready, and all are in the view."""
        controller = self.controller
        await self.until(
            lambda: (
                all(r.state is WorkerState.READY for r in controller.workers.values())
                and all(m.state is WorkerState.READY for m in controller.view.members.values())
                and len(controller.view.members) == len(controller.workers)
            ),
            "all workers are ready",
        )

    async def generate(
        self, request: GenerationRequest, request_id: str, take: Callable[[TokenEvent], None]
    ) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        stream = self.source.generate(request, request_id=request_id, deadline_s=deadline_s)
        async with aclosing(stream) as events:
            async for event in events:
                take(event)

    async def status(self) -> dict[str, ProcessStatus]:
        """All workers' statuses."""
        ids = self.fleet.worker_ids
        statuses = [await self.shell.wait(self.fleet.status(worker_id)) for worker_id in ids]
        return dict(zip(ids, statuses, strict=True))


@asynccontextmanager
async def process_cluster(
    hosts: HostPool, config: ClusterConfig, settings: ControllerSettings, model: ModelBytes
) -> AsyncGenerator[ProcessCluster]:
    """A ready cluster; its processes return to the pool at the end."""
    cluster = ProcessCluster(hosts, config, settings, model)
    try:
        cluster.controller.start()
        cluster.shell.kick()
        await cluster.until_ready()
        yield cluster
    finally:
        await cluster.source.close()
        cluster.controller.close()
        cluster.shell.kick()
        for worker_id in cluster.fleet.worker_ids:
            await cluster.shell.wait(cluster.fleet.stop(worker_id))
        cluster.shell.tasks.close()
