"""Worker cores over real shards of a model directory, placed by the planner."""

from pathlib import Path

import jax
import jax.numpy as jnp

from milliways.cluster.control.planner import (
    AttentionCut,
    Placement,
    PlacementPolicy,
    WorkerMemory,
    plan,
)
from milliways.cluster.host.model_bytes import checkpoint_bytes
from milliways.model.checkpoint import Checkpoint
from milliways.model.decoder import Decoder
from milliways.model.runner import CacheSize
from milliways.runtime.tasks import Tasks
from milliways.wire.placement import ShardPlan
from milliways.wire.view import ClusterView, Member, WorkerState, chains_of
from milliways.workers.core import WorkerCore
from milliways.workers.devices import LocalDevices
from milliways.workers.experts import ExpertShard
from milliways.workers.kv_arrays import KvArrays
from milliways.workers.loading import ShardLoader
from milliways.workers.spreading import PartBytes
from tests.runners import BACKEND, kernels_of

PLENTY_BYTES = 1 << 40


def view_of(placement: Placement, epoch: int = 1) -> ClusterView:
    """A view in which every worker of the placement is ready."""
    members = {
        worker.worker.worker_id: Member(
            worker_id=worker.worker.worker_id,
            incarnation=1,
            address="",
            state=WorkerState.READY,
            first_layer=worker.attention.first_layer,
            num_layers=worker.attention.num_layers,
            has_ends=worker.attention.has_ends,
            experts=frozenset(worker.experts),
        )
        for worker in placement.workers
    }
    shards = {worker.worker.worker_id: worker.attention for worker in placement.workers}
    num_layers = max(shard.first_layer + shard.num_layers for shard in shards.values())
    chains = chains_of(shards, num_layers)
    return ClusterView(placement_epoch=epoch, members=members, chains=chains)


def place(
    model_dir: Path, num_workers: int, replicas: int, cut: AttentionCut, kv_value_bytes: int = 4
) -> Placement:
    """Spreads a model over equal workers with plenty of memory."""
    with Checkpoint.open(model_dir) as checkpoint:
        sizes = checkpoint_bytes(checkpoint, kv_value_bytes)
    workers = [
        WorkerMemory(worker_id=f"w{i}", node_id=f"n{i}", memory_bytes=PLENTY_BYTES)
        for i in range(num_workers)
    ]
    return plan(sizes, workers, PlacementPolicy(expert_replicas=replicas, attention=cut))


class ShardFactory:
    """Makes each member's core from one checkpoint; counts the bytes that each reads."""

    def __init__(
        self,
        model_dir: Path,
        cache_size: CacheSize,
        dtype: str = "float32",
        backend: str = BACKEND,
        num_devices: int = 1,
    ) -> None:
        self.bytes_read: dict[str, int] = {}
        self.arrays: dict[str, KvArrays | None] = {}
        self._model_dir = model_dir
        self._cache_size = cache_size
        self._dtype = jnp.dtype(dtype)
        self._ops, self._kernels = kernels_of(backend)
        with Checkpoint.open(model_dir) as checkpoint:
            sizes = checkpoint_bytes(checkpoint, self._dtype.itemsize)
        self._local = LocalDevices(
            devices=tuple(jax.local_devices()[:num_devices]),
            parts=PartBytes.of(sizes, cache_size.num_blocks * cache_size.block_size),
        )

    def __call__(self, member: Member, tasks: Tasks) -> WorkerCore:
        with Checkpoint.open(self._model_dir) as checkpoint:
            decoder = Decoder(config=checkpoint.config, dtype=self._dtype, ops=self._ops)
            shard_plan = ShardPlan(
                first_layer=member.first_layer,
                num_layers=member.num_layers,
                has_ends=member.has_ends,
                experts=member.experts,
            )
            loader = ShardLoader(
                checkpoint, decoder, self._kernels, lambda num_bytes: None, self._local
            )
            experts = ExpertShard(decoder)
            attention = loader.load_attention(shard_plan, experts, self._cache_size)
            for layer, groups in loader.load_experts(member.experts):
                experts.add(layer, groups)
            self.bytes_read[member.worker_id] = loader.bytes_read
            self.arrays[member.worker_id] = attention.kv if attention else None
        core = WorkerCore(member.worker_id, member.incarnation, experts, attention, tasks)
        core.fence.move(WorkerState.READY)
        return core
