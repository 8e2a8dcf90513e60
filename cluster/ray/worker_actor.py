"""A worker as a Ray actor: a process of its own, on its own GPUs. It decides nothing."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from milliways.cluster.control.fleet import Existing, Loaded, Spawned
from milliways.cluster.host.local_devices import tell_jax
from milliways.cluster.host.memory_limit import USABLE_PART, usable_memory_bytes
from milliways.cluster.ray.environment import FAULTS_VARIABLE
from milliways.cluster.settings.config import LOOPBACK, ClusterConfig
from milliways.model.manifest import Manifest
from milliways.model.small_files import SmallFiles
from milliways.runtime.fatal import end_process
from milliways.runtime.user_cache import keep_programs
from milliways.wire.errors import ConfigError, StartupError
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.status import ProcessStatus
from milliways.wire.view import ClusterView, Member

if TYPE_CHECKING:
    from milliways.cluster.host.worker_process import WorkerProcess


class WorkerActor:
    """What the controller calls. `until_gone` never returns: when it fails, the worker is dead."""

    def __init__(
        self, config: ClusterConfig, worker_id: str, incarnation: int, sizes: ModelBytes
    ) -> None:
        keep_programs()
        tell_jax(config.workers.gpus_each, os.environ)
        # JAX reads its settings when it is imported, which this does.
        from milliways.cluster.host.worker_process import WorkerProcess

        host = ray.util.get_node_ip_address() or LOOPBACK
        self._spawned: Spawned | None = None

        def make(small_files: SmallFiles | None) -> WorkerProcess:
            memory_bytes = round(config.workers.memory_gb_each * 1e9) or _memory_bytes(config)
            return WorkerProcess(
                config,
                worker_id,
                incarnation,
                host,
                end_process,
                memory_bytes,
                sizes=sizes,
                small_files=small_files,
            )

        self._make = make
        self._made: WorkerProcess | None = None

    @property
    def _process(self) -> "WorkerProcess":
        assert self._made is not None, "before start"
        return self._made

    async def start(self, small_files: SmallFiles | None) -> Spawned:
        """Opens the servers; returns their addresses.

        Configuration and tokenizer are those that other workers have read, or are read now.

        Not in the constructor: Ray would not say of which type an error was.

        Raises:
            CheckpointError, ModelConfigError, TokenizerError: what is wrong with which file.
        """
        self._made = await asyncio.to_thread(self._make, small_files)
        spawned = await asyncio.to_thread(self._process.start)
        self._spawned = Spawned(
            address=spawned.address,
            router_address=spawned.router_address,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=spawned.pid,
            memory_bytes=spawned.memory_bytes,
        )
        return self._spawned

    async def describe(self) -> Existing | None:
        """What `WorkerProcess.describe` returns; None before the servers are open.

        Answers at once, without another thread: all of those may be waiting for a busy worker.
        """
        return None if self._spawned is None else self._process.describe(self._spawned)

    async def load(
        self, shards: ShardPlan, bytes_wanted: int, wanted: Manifest, peers: Sequence[Member]
    ) -> Loaded:
        return await asyncio.to_thread(self._process.load, shards, bytes_wanted, wanted, peers)

    async def unload(self, kept: frozenset[ExpertId]) -> None:
        await asyncio.to_thread(self._process.unload, kept)

    async def publish(self, view: ClusterView) -> None:
        await asyncio.to_thread(self._process.publish, view)

    async def fence(self, placement_epoch: int) -> None:
        await asyncio.to_thread(self._process.fence, placement_epoch)

    async def drain(self) -> None:
        await asyncio.to_thread(self._process.drain)

    async def drop_replies(self, count: int) -> int:
        """As `WorkerProcess.drop_replies`.

        Raises:
            ConfigError: this cluster was started without permission for such faults.
        """
        value = os.environ.get(FAULTS_VARIABLE, "")
        if value != "1":
            raise ConfigError(FAULTS_VARIABLE, value, "'1' where the cluster was started")
        return await asyncio.to_thread(self._process.drop_replies, count)

    async def progress(self) -> tuple[int, int]:
        """Bytes read, and bytes to be read."""
        progress = self._process.progress
        return progress.bytes_read, progress.bytes_wanted

    async def status(self) -> ProcessStatus:
        return await asyncio.to_thread(self._process.status)

    async def until_gone(self) -> None:
        await asyncio.Event().wait()


def _memory_bytes(config: ClusterConfig) -> int:
    """The memory that a worker may use: that of its GPUs, or an even share of the machine's.

    In a container with a memory limit, that limit is the machine's memory.
    """
    if config.workers.gpus_each > 0:
        import jax

        if jax.default_backend() == "cpu":
            wanted = f"workers.gpus_each is {config.workers.gpus_each:g}"
            raise StartupError(f"{wanted}, and JAX finds no GPU here: is jax[cuda12] installed?")
        from milliways.workers.devices import find_devices

        stats = [device.memory_stats() for device in find_devices(config.workers.gpus_each)]
        return sum(int(s["bytes_limit"]) for s in stats if s)
    return round(USABLE_PART * usable_memory_bytes() / config.workers.count)
