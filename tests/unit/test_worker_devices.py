"""How many devices a worker takes, and what is told of them."""

from dataclasses import replace

import jax
import pytest

from milliways.cluster.cli.commands.status import format_status
from milliways.cluster.settings.config import WorkerSettings
from milliways.wire.errors import ConfigError, PlacementError, StartupError
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.wire.status import DeviceStatus
from milliways.workers.devices import LocalDevices, find_devices
from milliways.workers.spreading import PartBytes
from tests.statuses import ANSWERING, CLUSTER, PROCESS

PARTS = PartBytes(end_bytes=10, layer_bytes=4, expert_bytes=3)
PLAN = ShardPlan(
    first_layer=0,
    num_layers=4,
    has_ends=True,
    experts=frozenset(ExpertId(layer, e) for layer in range(4) for e in range(2)),
)


@pytest.mark.parametrize("gpus_each", [0.0, 0.5, 1.0, 2.0, 8.0])
def test_settings_take_parts_of_a_gpu_and_whole_ones(gpus_each: float) -> None:
    assert WorkerSettings(gpus_each=gpus_each).gpus_each == gpus_each


def test_a_gpu_and_a_half_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus_each = 1.5: must be a whole number if above 1"):
        WorkerSettings(gpus_each=1.5)


@pytest.mark.parametrize(("gpus_each", "count"), [(0, 1), (0.25, 1), (1, 1), (2, 2), (8, 8)])
def test_a_worker_takes_the_devices_it_asked_for(gpus_each: float, count: int) -> None:
    assert find_devices(gpus_each) == tuple(jax.local_devices()[:count])


def test_fewer_devices_than_asked_for_are_an_error() -> None:
    with pytest.raises(StartupError, match="gpus_each = 9: must be at most 8, the devices"):
        find_devices(9)


def test_memory_is_shared_out_and_a_plan_held_against_it() -> None:
    devices = find_devices(2)
    local = LocalDevices(devices=devices, parts=PARTS, memory_bytes=52)
    assert local.memory_bytes_each == [26, 26]
    # A gap smaller than an expert may be left.
    assert local.plannable_bytes == 49
    local.check(PLAN)
    assert [share.num_bytes(PARTS) for share in local.shares(PLAN)] == [26, 24]
    with pytest.raises(PlacementError, match="device 0 needs"):
        LocalDevices(devices=devices, parts=PARTS, memory_bytes=50).check(PLAN)
    LocalDevices(devices=devices, parts=PARTS).check(PLAN)


def test_layers_and_ends_lie_where_the_plan_says() -> None:
    local = LocalDevices(devices=find_devices(3), parts=PARTS)
    first, second, third = local.devices
    assert local.end_device == first
    assert local.layer_devices(PLAN) == [second, second, third, third]
    assert set(local.expert_devices(PLAN.experts, local.shares(PLAN)).values()) <= set(
        local.devices
    )


def test_status_has_a_line_for_each_device_of_a_worker_with_several() -> None:
    first = DeviceStatus(
        device="gpu:0",
        layers=(0, 8),
        has_ends=True,
        num_experts=57,
        bytes=36_100_000_000,
        memory_bytes=60_000_000_000,
    )
    second = replace(first, device="gpu:1", layers=(0, 0), has_ends=False, memory_bytes=0)
    workers = tuple(
        replace(ANSWERING, worker_id=worker_id, process=replace(PROCESS, devices=devices))
        for worker_id, devices in (("worker-0", (first, second)), ("worker-1", (first,)))
    )
    status = replace(CLUSTER, workers=workers)
    lines = format_status(status).splitlines()
    assert lines[4:6] == [
        "  gpu:0     layers 0-7, 57 experts, embedding and output head; 36.1 of 60.0 GB",
        "  gpu:1     layers -, 57 experts; 36.1 GB",
    ]
    assert [line[:8] for line in lines[3:7]] == ["worker-0", "  gpu:0 ", "  gpu:1 ", "worker-1"]
