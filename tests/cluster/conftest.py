"""Tests here share a real cluster (fixture `cluster`) and a Ray without Milliways (`head`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_head import RayHead, ray_head
from tests.served_cluster import short_folder

HERE = Path(__file__).resolve().parent
# The first test waits for the cluster: processes start, programs are compiled.
TIMEOUT_S = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
            # With xdist one worker runs all these tests, so that they share one cluster.
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(scope="session")
def head() -> Iterator[RayHead]:
    """A running Ray without Milliways."""
    with short_folder() as folder, ray_head(folder) as running:
        yield running
