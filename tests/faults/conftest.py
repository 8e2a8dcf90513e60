"""Tests here break real processes; some use the same shared cluster as `tests/cluster`."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# Killed processes must restart within this, on a machine that may be busy.
TIMEOUT_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
            item.add_marker(pytest.mark.xdist_group("cluster"))
