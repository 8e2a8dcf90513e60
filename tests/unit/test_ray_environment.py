"""What Ray is told before it is imported."""

import os

import pytest

from milliways.cluster.ray.environment import be_equal

NICENESS = "RAY_worker_niceness"


def test_actors_run_at_the_priority_of_the_command_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(NICENESS, "5")
    be_equal()
    assert os.environ.get(NICENESS) == "5"
    monkeypatch.delenv(NICENESS)
    be_equal()
    assert os.environ.get(NICENESS) == "0"
