"""What Ray is told before it is imported."""

import os

import pytest

from milliways.cluster.ray.environment import be_equal


def test_actors_run_at_the_priority_of_the_command_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "5")
    be_equal()
    assert os.environ["RAY_worker_niceness"] == "5"
    monkeypatch.delenv("RAY_worker_niceness")
    be_equal()
    assert os.environ["RAY_worker_niceness"] == "0"
