"""Which of a worker's devices holds what: a pure plan from sizes and memory.

Nothing is cut. Each attention layer and each expert is whole on one device, so one device computes
each sum, with the same bits as any other device.

1. The embedding and the output head are on the first device.
2. Attention layers, each with its KV cache, are in consecutive runs, as even in bytes as possible:
   a batch changes devices once for each run.
3. A device's free memory decides how many experts it holds. The experts of one layer are on as
   many devices as possible, because these compute at the same time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from milliways.wire.errors import PlacementError
from milliways.wire.placement import BYTES_PER_GB, ExpertId, ModelBytes, ShardPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PartBytes:
    """The bytes of each part on its device. A layer of attention includes its KV cache."""

    end_bytes: int
    layer_bytes: int
    expert_bytes: int

    @classmethod
    def of(cls, model: ModelBytes, kv_tokens: int) -> "PartBytes":
        """The parts of a model, with `kv_tokens` positions of KV cache."""
        return cls(
            end_bytes=model.end_bytes,
            layer_bytes=model.attention_layer_bytes + model.kv_layer_bytes_per_token * kv_tokens,
            expert_bytes=model.expert_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceShare:
    """What is on one device: the ends or not, attention layers, experts."""

    has_ends: bool = False
    layers: Sequence[int] = ()
    experts: frozenset[ExpertId] = frozenset()

    def num_bytes(self, parts: PartBytes) -> int:
        """How much of the device's memory it takes."""
        return (
            self.has_ends * parts.end_bytes
            + len(self.layers) * parts.layer_bytes
            + len(self.experts) * parts.expert_bytes
        )


def spread_layers(parts: PartBytes, plan: ShardPlan, num_devices: int) -> list[range]:
    """The attention layers of each device."""
    taken = [plan.has_ends * parts.end_bytes, *[0] * (num_devices - 1)]
    counts = [0] * num_devices
    for _ in range(plan.num_layers):
        least = min(range(num_devices), key=lambda device: taken[device])
        taken[least] += parts.layer_bytes
        counts[least] += 1
    runs: list[range] = []
    first = plan.first_layer
    for count in counts:
        runs.append(range(first, first + count))
        first += count
    return runs


def spread_experts(
    parts: PartBytes,
    shares: Sequence[DeviceShare],
    wanted: Iterable[ExpertId],
    memory_bytes: Sequence[int],
) -> dict[ExpertId, int]:
    """The device of each wanted expert, given what the devices hold already.

    If memory is short, all devices exceed it evenly; `check_memory` refuses that.
    """
    wanted = sorted(wanted)
    quotas = _quotas(parts, shares, len(wanted), memory_bytes)
    num_in_layer = [Counter(expert_id.layer for expert_id in share.experts) for share in shares]
    placed: dict[ExpertId, int] = {}
    for expert_id in wanted:
        device = min(
            (device for device, quota in enumerate(quotas) if quota),
            key=lambda device: (num_in_layer[device][expert_id.layer], -quotas[device]),
        )
        placed[expert_id] = device
        quotas[device] -= 1
        num_in_layer[device][expert_id.layer] += 1
    return placed


def with_experts(
    shares: Sequence[DeviceShare], placed: Mapping[ExpertId, int]
) -> list[DeviceShare]:
    """The shares with experts added."""
    return [
        DeviceShare(
            has_ends=share.has_ends,
            layers=share.layers,
            experts=share.experts | {e for e, device in placed.items() if device == number},
        )
        for number, share in enumerate(shares)
    ]


def check_memory(
    parts: PartBytes, shares: Sequence[DeviceShare], memory_bytes: Sequence[int]
) -> None:
    """Checks that shares fit into the devices.

    Raises:
        PlacementError: a device has too little memory; says which, for what, and how much.
    """
    for device, (share, has) in enumerate(zip(shares, memory_bytes, strict=True)):
        needs = share.num_bytes(parts)
        if needs > has:
            kinds = {
                "embedding and output head": share.has_ends * parts.end_bytes,
                f"{len(share.layers)} attention layers with KV cache": len(share.layers)
                * parts.layer_bytes,
                f"{len(share.experts)} experts": len(share.experts) * parts.expert_bytes,
            }
            sums = " + ".join(f"{kind} {_gb(size)}" for kind, size in kinds.items() if size)
            raise PlacementError(f"device {device} needs {_gb(needs)} ({sums}), has {_gb(has)}")


def plannable_bytes(parts: PartBytes, memory_bytes: int, num_devices: int) -> int:
    """How much of all devices' memory a planner may fill that sees only one memory.

    A gap smaller than an expert may be left on each device but one.
    """
    return max(0, memory_bytes - (num_devices - 1) * parts.expert_bytes)


def _quotas(
    parts: PartBytes, shares: Sequence[DeviceShare], count: int, memory_bytes: Sequence[int]
) -> list[int]:
    """How many experts each device takes, so that the free memory is as even as possible."""
    room = [has - share.num_bytes(parts) for share, has in zip(shares, memory_bytes, strict=True)]
    quotas = [0] * len(shares)
    for _ in range(count):
        most = max(range(len(room)), key=lambda device: room[device])
        room[most] -= parts.expert_bytes
        quotas[most] += 1
    return quotas


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / BYTES_PER_GB:.1f} GB"
