"""How a worker's parts are spread over its devices."""

from collections import Counter

import pytest

from milliways.wire.errors import PlacementError
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.workers.spreading import (
    DeviceShare,
    PartBytes,
    check_memory,
    plannable_bytes,
    spread_experts,
    spread_layers,
    with_experts,
)

GB = 10**9
GROK_1 = ModelBytes(
    num_layers=64,
    num_experts=8,
    expert_bytes=604 * 10**6,
    attention_layer_bytes=88 * 10**6,
    end_bytes=3221 * 10**6,
    kv_layer_bytes_per_token=4096,
)
PARTS = PartBytes.of(GROK_1, kv_tokens=8192)
EVERYTHING = frozenset(ExpertId(layer, e) for layer in range(64) for e in range(8))
WHOLE = ShardPlan(first_layer=0, num_layers=64, has_ends=True, experts=EVERYTHING)


def shares_of(plan: ShardPlan, memory_bytes: list[int]) -> list[DeviceShare]:
    runs = spread_layers(PARTS, plan, len(memory_bytes))
    shares = [
        DeviceShare(has_ends=plan.has_ends and i == 0, layers=run) for i, run in enumerate(runs)
    ]
    return with_experts(shares, spread_experts(PARTS, shares, plan.experts, memory_bytes))


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_everything_lies_on_one_device_each_and_bytes_are_even(num_devices: int) -> None:
    memory = [400 * GB // num_devices] * num_devices
    shares = shares_of(WHOLE, memory)
    assert [layer for share in shares for layer in share.layers] == list(range(64))
    assert sum(len(share.experts) for share in shares) == len(EVERYTHING)
    assert frozenset[ExpertId]().union(*(share.experts for share in shares)) == EVERYTHING
    assert [share.has_ends for share in shares] == [True] + [False] * (num_devices - 1)
    sizes = [share.num_bytes(PARTS) for share in shares]
    assert max(sizes) - min(sizes) <= PARTS.expert_bytes
    check_memory(PARTS, shares, memory)


@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_experts_of_a_layer_lie_on_as_many_devices_as_they_can(num_devices: int) -> None:
    shares = shares_of(WHOLE, [60 * GB] * num_devices)
    uneven = 0
    for layer in range(64):
        counts = [sum(e.layer == layer for e in share.experts) for share in shares]
        uneven += max(counts) > -(-8 // num_devices)
    # The first device has the ends, and so fewer experts.
    assert uneven <= PARTS.end_bytes // PARTS.expert_bytes + 1


def test_a_chain_of_workers_keeps_its_layer_numbers() -> None:
    plan = ShardPlan(first_layer=16, num_layers=5, has_ends=False, experts=frozenset())
    assert spread_layers(PARTS, plan, 2) == [range(16, 19), range(19, 21)]
    empty = ShardPlan(first_layer=64, num_layers=0, has_ends=True, experts=frozenset())
    assert spread_layers(PARTS, empty, 2) == [range(64, 64), range(64, 64)]


def test_experts_that_come_later_go_where_room_is() -> None:
    shares = [
        DeviceShare(experts=frozenset(ExpertId(layer, 0) for layer in range(6))),
        DeviceShare(),
        DeviceShare(experts=frozenset({ExpertId(0, 1), ExpertId(0, 2)})),
    ]
    later = [ExpertId(0, e) for e in range(3, 8)]
    placed = spread_experts(PARTS, shares, later, [20 * GB] * 3)
    assert Counter(placed.values()) == {1: 4, 2: 1}
    assert sum(len(s.experts) for s in with_experts(shares, placed)) == 13


def test_a_device_that_is_too_small_is_named_with_the_arithmetic() -> None:
    memory = [32 * GB] * 8
    with pytest.raises(PlacementError) as caught:
        check_memory(PARTS, shares_of(WHOLE, memory), memory)
    assert str(caught.value) == (
        "device 0 needs 40.1 GB (embedding and output head 3.2 GB + 61 experts 36.8 GB),"
        " has 32.0 GB"
    )


@pytest.mark.parametrize("num_devices", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("memory_gb", [5.0, 5.4, 6.1, 41.3, 47.9])
def test_what_a_planner_may_fill_fits_the_devices(num_devices: int, memory_gb: float) -> None:
    each = round(memory_gb * GB)
    may_fill = plannable_bytes(PARTS, num_devices * each, num_devices)
    fixed = PARTS.end_bytes + 20 * PARTS.layer_bytes
    count = min(len(EVERYTHING), max(0, may_fill - fixed) // PARTS.expert_bytes)
    experts = frozenset(sorted(EVERYTHING)[:count])
    plan = ShardPlan(first_layer=0, num_layers=20, has_ends=True, experts=experts)
    if may_fill >= fixed:
        memory = [each] * num_devices
        check_memory(PARTS, shares_of(plan, memory), memory)
