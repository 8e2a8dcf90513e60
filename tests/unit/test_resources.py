"""What people read about resources that are missing."""

import pytest

from milliways.cluster.ray.resources import Amounts, missing_of

GPU: Amounts = {"CPU": 1, "GPU": 1}


@pytest.mark.parametrize(
    ("wanted", "nodes", "free", "says"),
    [
        (GPU, [{"CPU": 8}], {"CPU": 8}, "a node with 1 CPU and 1 GPU (the largest has 0 GPU)"),
        ({"GPU": 2}, [{"GPU": 1}, {"GPU": 1}], {}, "a node with 2 GPU (the largest has 1 GPU)"),
        (GPU, [{"CPU": 8}, {"GPU": 8}], {}, "a node with 1 CPU and 1 GPU (no node has all of it)"),
        (GPU, [], {}, "a node with 1 CPU and 1 GPU (no node is there)"),
        (
            GPU,
            [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}],
            {"CPU": 2},
            "a node with 1 CPU and 1 GPU free (free are 0 of 2 GPU)",
        ),
        (GPU, [{"CPU": 4, "GPU": 1}], {"CPU": 2, "GPU": 1}, "its process to start"),
        ({"expert": 0.5}, [{}], {}, "a node with 0.5 expert (the largest has 0 expert)"),
    ],
)
def test_what_is_missing_is_named(
    wanted: Amounts, nodes: list[Amounts], free: Amounts, says: str
) -> None:
    assert missing_of(wanted, nodes, free) == says
