"""Reads a worker's shards from the checkpoint: a layer at a time, and no bytes of other workers.

Each part goes straight to its device.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax

from milliways.model.checkpoint import TensorSource
from milliways.model.decoder import Decoder
from milliways.model.params import AttentionParams, Loader, load_attention, load_ends, load_experts
from milliways.model.runner import CacheSize
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.workers.attention import AttentionShard, ExchangeNode
from milliways.workers.devices import Device, LocalDevices, settle
from milliways.workers.experts import ExpertGroup, ExpertShard, in_few_sizes
from milliways.workers.spreading import DeviceShare

T = TypeVar("T")


class ShardLoader:
    """Loads what plans ask for. Calls `on_progress` with the number of bytes read so far."""

    def __init__(
        self,
        source: TensorSource,
        decoder: Decoder,
        loader: Loader,
        on_progress: Callable[[int], None],
        local: LocalDevices,
    ) -> None:
        self._source = source
        self._decoder = decoder
        # Mapped experts stay valid as long as their loader exists.
        self._loader = loader
        self._on_progress = on_progress
        self._local = local

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def load_attention(
        self,
        plan: ShardPlan,
        experts: ExpertShard,
        cache_size: CacheSize,
        node: ExchangeNode | None = None,
    ) -> AttentionShard | None:
        """The attention shard of a plan; None if the plan has none.

        It uses the `node` if it has all layers.
        """
        if not plan.has_attention:
            return None
        local = self._local
        ends = None
        if plan.has_ends:
            ends = self._on(local.end_device, lambda: load_ends(self._source, self._loader))
        layer_devices = local.layer_devices(plan)
        attention = tuple(
            self._load_layer(layer, device)
            for layer, device in enumerate(layer_devices, plan.first_layer)
        )
        return AttentionShard(
            self._decoder,
            plan.first_layer,
            attention,
            ends,
            cache_size,
            experts.whole_layer,
            layer_devices,
            local.end_device,
            node if plan.has_ends and plan.num_layers == self._decoder.config.num_layers else None,
        )

    def load_experts(
        self,
        wanted: Iterable[ExpertId],
        shares: Sequence[DeviceShare] = (),
        is_ready: bool = False,
    ) -> Iterator[tuple[int, list[ExpertGroup]]]:
        """Loads experts; gives each layer's groups when it has them.

        There is one for each device. If the worker is ready already, there are several of few
        sizes instead: no other sizes have their programs. `shares` is what the devices hold
        already, which decides where there is room.
        """
        stacks: defaultdict[int, defaultdict[Device, list[int]]]
        stacks = defaultdict(lambda: defaultdict(list))
        for expert_id, device in self._local.expert_devices(wanted, shares).items():
            stacks[expert_id.layer][device].append(expert_id.expert)
        for layer, on_devices in stacks.items():
            groups = [
                self._load_stack(layer, list(some), device)
                for device, ids in on_devices.items()
                for some in (in_few_sizes(ids) if is_ready else [ids])
            ]
            yield layer, groups

    def _load_layer(self, layer: int, device: Device) -> AttentionParams:
        return self._on(device, lambda: load_attention(self._source, layer, self._loader))

    def _load_stack(self, layer: int, expert_ids: list[int], device: Device) -> ExpertGroup:
        params = self._on(
            device, lambda: load_experts(self._source, layer, self._loader, expert_ids)
        )
        return ExpertGroup(tuple(expert_ids), params, device)

    def _on(self, device: Device, load: Callable[[], T]) -> T:
        with jax.default_device(device):
            loaded = settle(load(), device)
        self._on_progress(self._source.bytes_read)
        return loaded


def shares_now(
    local: LocalDevices, attention: AttentionShard | None, experts: ExpertShard
) -> list[DeviceShare]:
    """What each device holds."""
    return [
        DeviceShare(
            has_ends=attention is not None and attention.has_ends and device == local.end_device,
            layers=() if attention is None else attention.layers_on(device),
            experts=experts.held_on(device),
        )
        for device in local.devices
    ]
