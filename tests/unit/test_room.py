"""Whether new workers have room beside those that run: by resources, and by memory."""

from collections.abc import Mapping

import pytest

from milliways.cluster.control.planner import AttentionCut, PlacementPolicy
from milliways.cluster.control.room import NodeRoom, assigned, check_room
from milliways.cluster.control.targets import ControllerSettings
from milliways.wire.errors import PlacementError
from tests.fake_fleet import MODEL

# With all experts twice and attention in each of two workers: 2 * 80 + 2 * 20 bytes.
NEEDED_BYTES = 200
CPU = {"CPU": 1.0}


def settings(num_workers: int = 2) -> ControllerSettings:
    policy = PlacementPolicy(attention=AttentionCut.AUTO, kv_tokens=1)
    return ControllerSettings(num_workers=num_workers, policy=policy)


def node(name: str, memory_bytes: int, used_bytes: int = 0, **free: float) -> NodeRoom:
    return NodeRoom(name, free, memory_bytes, used_bytes)


def test_each_worker_goes_to_a_node_that_has_all_that_it_takes() -> None:
    nodes = [node("a", 100, CPU=2.0), node("b", 100, CPU=8.0, GPU=1.0), node("c", 1, CPU=0.5)]
    gpu = {"CPU": 1.0, "GPU": 1.0}
    places = assigned([gpu, CPU, CPU, gpu], nodes)
    assert [place and place.node_id for place in places] == ["b", "a", "a", None]


@pytest.mark.parametrize(
    ("wanted", "nodes", "says"),
    [
        (
            CPU | {"GPU": 1.0},
            [node("a", 1000, CPU=9.0, GPU=1.0)],
            "no room for 2 workers beside the present ones: 1 have room, and another needs"
            " 1 CPU and 1 GPU of one node (the most that a node has left: 9 CPU and 1 GPU)",
        ),
        (CPU, [], "0 have room, and another needs 1 CPU of one node (no node is there)"),
        (
            CPU,
            [node("node-1", 700, 501, CPU=9.0)],
            "they need 2e-07 GB on node node-1, which has 7e-07 GB for workers and 5.01e-07 GB"
            " of that in use",
        ),
        (CPU, [node("node-1", 60, CPU=9.0)], "needs 0.0 MB, has 2 x 3e-08 GB"),
    ],
)
def test_lack_of_room_is_said_with_its_calculation(
    wanted: Mapping[str, float], nodes: list[NodeRoom], says: str
) -> None:
    with pytest.raises(PlacementError) as refused:
        check_room(MODEL, settings(), [wanted, wanted], nodes)
    assert says in str(refused.value)


def test_room_is_said_too() -> None:
    says = "2 new workers have room: each takes 1 CPU; together they need 2e-07 GB"
    nodes = [node("node-1", 700, 700 - NEEDED_BYTES, CPU=2.0)]
    assert check_room(MODEL, settings(), [CPU, CPU], nodes) == says


def test_memory_of_hosts_does_not_count_for_workers_on_gpus() -> None:
    nodes = [node("node-1", 0, CPU=2.0)]
    assert "together" not in check_room(MODEL, settings(), [CPU, CPU], nodes, on_gpus=True)
