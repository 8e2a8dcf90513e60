"""The devices of this process that a worker computes on, and what is to be on each."""

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

# The memory of a device without a limit.
NO_LIMIT_BYTES = 1 << 60
T = TypeVar("T")


class Device(Protocol):
    """What we use of a JAX device. Type checkers cannot resolve JAX's own name for it."""

    @property
    def platform(self) -> str: ...

    @property
    def id(self) -> int: ...

    def memory_stats(self) -> Mapping[str, int] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevices:
    """Devices of equal memory. `memory_bytes` is the limit of all together; 0 is no limit."""

    devices: tuple[Device, ...]
    parts: PartBytes
    memory_bytes: int = 0

    @property
    def memory_bytes_each(self) -> list[int]:
        """The limit of each device."""
        each = self.memory_bytes // len(self.devices) if self.memory_bytes else NO_LIMIT_BYTES
        return [each] * len(self.devices)

    @property
    def plannable_bytes(self) -> int:
        """The limit for a planner that sees one memory; 0 is no limit."""
        return plannable_bytes(self.parts, self.memory_bytes, len(self.devices))

    @property
    def end_device(self) -> Device:
        """The device of the embedding and the output head."""
        return self.devices[0]

    def layer_devices(self, plan: ShardPlan) -> list[Device]:
        """The device of each attention layer of a plan."""
        runs = spread_layers(self.parts, plan, len(self.devices))
        return [device for device, run in zip(self.devices, runs, strict=True) for _ in run]

    def expert_devices(
        self, wanted: Iterable[ExpertId], shares: Sequence[DeviceShare]
    ) -> dict[ExpertId, Device]:
        """The device of each wanted expert, in their order, given what the devices hold."""
        shares = shares or [DeviceShare()] * len(self.devices)
        placed = spread_experts(self.parts, shares, wanted, self.memory_bytes_each)
        return {expert_id: self.devices[number] for expert_id, number in placed.items()}

    def check(self, plan: ShardPlan) -> None:
        """Checks that a plan fits into empty devices.

        Raises:
            PlacementError: a device has too little memory; says which, for what, and how much.
        """
        check_memory(self.parts, self.shares(plan), self.memory_bytes_each)

    def shares(self, plan: ShardPlan) -> list[DeviceShare]:
        """What of a plan is on which device, if all are empty."""
        runs = spread_layers(self.parts, plan, len(self.devices))
        shares = [
            DeviceShare(has_ends=plan.has_ends and number == 0, layers=run)
            for number, run in enumerate(runs)
        ]
        placed = spread_experts(self.parts, shares, plan.experts, self.memory_bytes_each)
        return with_experts(shares, placed)

    def status(self, shares: Sequence[DeviceShare]) -> tuple[DeviceStatus, ...]:
        """What is on each device, for `milliways status`."""
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
    """The devices of a worker with this number of GPUs; the default device if it is below 2.

    Raises:
        StartupError: JAX sees fewer.
    """
    local = jax.local_devices()
    num_devices = max(1, round(gpus_each))
    if len(local) < num_devices:
        limit = f"{len(local)}, the devices that JAX finds here"
        raise StartupError(f"workers.gpus_each = {gpus_each:g}: must be at most {limit}")
    # Without GPUs only one: several CPU devices would be one device under several names.
    return tuple(local[:num_devices])


def settle(arrays: T, device: Device) -> T:
    """Binds arrays to the device that they are on: JAX then computes with them there."""
    return jax.device_put(arrays, device)
