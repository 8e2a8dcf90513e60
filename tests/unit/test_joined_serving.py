"""`milliways serve --address` ends what it has started, and leaves alone what served before."""

# Ray's own types are unknown in part.
# pyright: basic

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from milliways.cluster.cli.serving import JoinedCluster
from milliways.cluster.settings.config import ClusterConfig
from milliways.wire.errors import ChangeRefusedError, ClusterError, StartupError

with warnings.catch_warnings():
    # Ray defines its models as pydantic once liked it; that is not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from milliways.cluster.ray import serving

CONFIG = ClusterConfig()


class FakeJoinedRay:
    """A Ray with a controller, or without; `done` is what was asked of it and of Serve."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, runs: bool) -> None:
        self.done: list[str] = []
        self.fails: ClusterError | None = None
        self.is_taken = False
        own: dict[str, Any] = {
            "ray": SimpleNamespace(get=lambda asked, timeout=0.0: asked, shutdown=lambda: None),
            "find_controller": lambda: None,
            "is_controller_running": lambda: runs,
            "find_or_start_controller": lambda config, at_s: self,
            "make_possible": self._prepare,
            "_open_proxy": self._listen,
            "deploy_ingress": lambda config, at_s: self.done.append("deploy"),
            "wait_for_ingress": lambda timeout_s: None,
            "stop": lambda keeps_serve: self.done.append("stop"),
        }
        for name, value in own.items():
            monkeypatch.setattr(serving, name, value, raising=False)

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self.done.append(method))

    def _prepare(self, declared: object) -> bool:
        self.done.append("prepare")
        if self.fails is not None:
            raise self.fails
        return True

    def _listen(self, ingress: object) -> None:
        if self.is_taken:
            raise StartupError("Ray Serve already listens on another address")


def serve_and_end() -> None:
    """What the two threads of the command do."""
    cluster = JoinedCluster(CONFIG, "address")
    cluster._application = serving.ServedApplication(CONFIG)
    try:
        cluster._application.start()
    finally:
        cluster._end()


def test_refused_command_leaves_the_cluster_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeJoinedRay(monkeypatch, runs=True)
    ray.fails = ChangeRefusedError("no room")
    with pytest.raises(ChangeRefusedError):
        serve_and_end()
    assert ray.done == ["begin", "prepare", "abandon"]


def test_command_that_cannot_listen_leaves_the_cluster_that_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeJoinedRay(monkeypatch, runs=True)
    ray.is_taken = True
    with pytest.raises(StartupError):
        serve_and_end()
    assert ray.done == ["begin", "prepare", "declare", "abandon"]


def test_cluster_whose_endpoint_is_ours_ends_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeJoinedRay(monkeypatch, runs=True)
    serve_and_end()
    assert ray.done == ["begin", "prepare", "declare", "deploy", "stop"]


def test_cluster_that_the_command_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeJoinedRay(monkeypatch, runs=False)
    ray.fails = ChangeRefusedError("no such model directory")
    with pytest.raises(ChangeRefusedError):
        serve_and_end()
    assert ray.done == ["begin", "prepare", "stop"]


def test_command_that_has_asked_nobody_yet_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeJoinedRay(monkeypatch, runs=True)
    cluster = JoinedCluster(CONFIG, "address")
    cluster._end()
    cluster._application = serving.ServedApplication(CONFIG)
    cluster._end()
    assert ray.done == []
