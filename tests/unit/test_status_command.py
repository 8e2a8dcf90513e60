"""What a command prints of a running cluster is its answer, and nothing of Ray's."""

# Ray's own types are unknown in part.
# pyright: basic

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest

from milliways.cluster.cli.commands import status

ANSWER = {"model": "demo", "workers": []}
NEWS = "(raylet) The node has been marked dead"


def test_news_of_ray_do_not_get_into_the_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def join(address: str) -> None:
        # As Ray's listener does, on the standard output, at any moment until it is shut down.
        print(NEWS)

    def get(answer: object, timeout: float) -> object:
        print(NEWS)
        return answer

    controller = SimpleNamespace(status=SimpleNamespace(remote=lambda: ANSWER))
    monkeypatch.setattr("milliways.cluster.ray.cluster.join", join)
    monkeypatch.setattr(
        "milliways.cluster.ray.controller_actor.find_controller", lambda: controller
    )
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.shutdown", lambda: print(NEWS))
    monkeypatch.setattr(status, "be_quiet", lambda: None)
    monkeypatch.setattr(status, "head_for", lambda address: None)
    status.run(Namespace(address="127.0.0.1:1", json=True))
    out, err = capsys.readouterr()
    assert json.loads(out) == ANSWER
    assert err.count(NEWS) == 3
