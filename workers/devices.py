"""The devices of this process that a worker computes on, and what shall lie on each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import jax

from milliways.wire.errors import StartupError
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.status import DeviceStatus
from milliways.workers.spreading import (
    DeviceShare,
    PartBytes,
    check_memory,
    plannable_bytes,
    spread_experts,
    spread_layers,
    with_experts,
)

# Of a device whose memory nobody limits.
NO_LIMIT_BYTES = 1 << 60
T = TypeVar("T")


class Device(Protocol):
    """What is asked of a device of JAX, whose own name for it type checkers do not follow."""

    @property
    def platform(self) -> str: ...

    @property
    def id(self) -> int: ...

    def memory_stats(self) -> Mapping[str, int] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevices:
    """Devices of equal memory, `memory_bytes` all together; 0 where nobody limits it."""

    devices: tuple[Device, ...]
    parts: PartBytes
    memory_bytes: int = 0

    @property
    def memory_bytes_each(self) -> list[int]:
        """What each may be filled with."""
        each = self.memory_bytes // len(self.devices) if self.memory_bytes else NO_LIMIT_BYTES
        return [each] * len(self.devices)

    @property
    def plannable_bytes(self) -> int:
        """What a planner that knows nothing of devices may fill; 0 where nobody limits it."""
        return plannable_bytes(self.parts, self.memory_bytes, len(self.devices))

    @property
    def end_device(self) -> Device:
        """Where embedding and output head lie."""
        return self.devices[0]

    def layer_devices(self, plan: ShardPlan) -> list[Device]:
        """The device of each attention layer of a plan."""
        runs = spread_layers(self.parts, plan, len(self.devices))
        return [device for device, run in zip(self.devices, runs, strict=True) for _ in run]

    def expert_devices(
        self, wanted: Iterable[ExpertId], shares: Sequence[DeviceShare]
    ) -> dict[ExpertId, Device]:
        """The device of each wanted expert, in their order, beside what the devices hold."""
        shares = shares or [DeviceShare()] * len(self.devices)
        placed = spread_experts(self.parts, shares, wanted, self.memory_bytes_each)
        return {expert_id: self.devices[number] for expert_id, number in placed.items()}

    def check(self, plan: ShardPlan) -> None:
        """Holds a plan for empty devices against their memory.

        Raises:
            PlacementError: one has too little; says which, what it needs, for what, and has.
        """
        check_memory(self.parts, self.shares(plan), self.memory_bytes_each)

    def shares(self, plan: ShardPlan) -> list[DeviceShare]:
        """How a plan lies on empty devices."""
        runs = spread_layers(self.parts, plan, len(self.devices))
        shares = [
            DeviceShare(has_ends=plan.has_ends and number == 0, layers=run)
            for number, run in enumerate(runs)
        ]
        placed = spread_experts(self.parts, shares, plan.experts, self.memory_bytes_each)
        return with_experts(shares, placed)

    def status(self, shares: Sequence[DeviceShare]) -> tuple[DeviceStatus, ...]:
        """What lies on each device, for people."""
        return tuple(
            DeviceStatus(
                device=f"{device.platform}:{device.id}",
                layers=(share.layers[0] if share.layers else 0, len(share.layers)),
                has_ends=share.has_ends,
                num_experts=len(share.experts),
                bytes=share.num_bytes(self.parts),
                memory_bytes=self.memory_bytes // len(self.devices),
            )
            for device, share in zip(self.devices, shares, strict=True)
        )


def find_devices(gpus_each: float) -> tuple[Device, ...]:
    """The devices of a worker with so many GPUs: all of them, or the default device.

    Raises:
        StartupError: JAX sees fewer.
    """
    local = jax.local_devices()
    num_devices = max(1, round(gpus_each))
    if len(local) < num_devices:
        limit = f"{len(local)}, the devices that JAX finds here"
        raise StartupError(f"workers.gpus_each = {gpus_each:g}: must be at most {limit}")
    # Not all of them by default: on a CPU they would be one device under several names.
    return tuple(local[:num_devices])


def settle(arrays: T, device: Device) -> T:
    """Binds arrays that lie on a device to it: what is computed with them is computed there."""
    return jax.device_put(arrays, device)
