"""`milliways apply` of another model: what it asks, in which order, and how it is taken back."""

# Ray's own types are unknown in part.
# pyright: basic

import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from milliways.cluster.cli.commands import apply
from milliways.cluster.settings.config import ClusterConfig
from milliways.wire.errors import ChangeRefusedError, StartupError
from milliways.wire.status import GenerationStatus, SettingsStatus
from milliways.wire.view import Declared

with warnings.catch_warnings():
    # Ray defines its models as pydantic once liked it; that is not ours to mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from milliways.cluster.ray import serving

SETTINGS = SettingsStatus(
    declared={},
    declared_at_s=1.5,
    observed={},
    pending=(),
    by_worker={},
    unconfirmed=(),
    problem="",
)


def generation(num_ready: int) -> GenerationStatus:
    return GenerationStatus(
        generation=2,
        model="/m",
        num_workers=2,
        num_ready=num_ready,
        is_complete=num_ready == 2,
        serves=False,
        text="starts",
    )


class FakeCluster:
    """A controller and a Serve that obey, or fail as told; `done` is what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.preparing: list[GenerationStatus | BaseException] = [generation(n) for n in (0, 1, 2)]
        self.fails_to_start = False
        # How often it must be asked to end the new workers: an ingress may use them still.
        self.num_abandons = 1
        monkeypatch.setattr(apply, "joined", self.joined)
        monkeypatch.setattr(apply, "POLL_S", 0.0)
        monkeypatch.setattr(serving, "is_deployed_from_file", lambda: False)
        monkeypatch.setattr(serving, "deploy_ingress", self.deploy)
        monkeypatch.setattr(serving, "wait_for_ingress", self.wait)

    @contextmanager
    def joined(self, address: str | None) -> Iterator["FakeCluster"]:
        yield self

    def ask(self, method: str, *arguments: Any, timeout_s: float = 0.0) -> Any:
        self.done.append(method)
        match method:
            case "config":
                return ClusterConfig()
            case "plan":
                return (
                    "model.path: 'demo' -> '/m' (as a new generation)",
                    "2 new workers have room",
                )
            case "prepare":
                answer = self.preparing.pop(0)
                if isinstance(answer, BaseException):
                    raise answer
                return answer
            case "settle":
                return SETTINGS
            case "abandon":
                return self.done.count("abandon") == self.num_abandons
        return None

    ask_next = ask

    def deploy(self, config: ClusterConfig, declared_at_s: float) -> None:
        self.done.append(f"deploy {config.model.path}")

    def wait(self, timeout_s: float) -> None:
        if self.fails_to_start and self.done[-1] == "deploy /m":
            raise StartupError("the endpoint does not start: no template")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(monkeypatch)


def run(folder: Path, *, dry_run: bool = False) -> None:
    file = folder / "s.toml"
    file.write_text('[model]\npath = "/m"\n', "utf-8")
    apply.run(Namespace(address=None, file=file, dry_run=dry_run))


def test_ingress_changes_over_when_the_new_workers_are_complete(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    *_, prepare, deploy, declare, settle = cluster.done
    assert (prepare, deploy, declare, settle) == ("prepare", "deploy /m", "declare", "settle")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("generation")] == [
        f"generation 2: {number} of 2 new workers ready" for number in range(3)
    ]
    assert lines[-1] == "done"


def test_dry_run_only_plans(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, dry_run=True)
    assert cluster.done == ["config", "plan"]
    assert "2 new workers have room" in capsys.readouterr().out


def test_ingress_stays_if_the_new_workers_cannot_be_complete(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.preparing[1] = ChangeRefusedError("generation 2 was given up")
    with pytest.raises(ChangeRefusedError, match="given up"):
        run(tmp_path)
    assert not any(step.startswith("deploy") for step in cluster.done)


def test_interrupted_command_ends_the_new_workers(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.preparing[1] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert cluster.done[-2:] == ["prepare", "abandon"]


def test_ingress_that_does_not_start_is_replaced_by_the_old_one_and_new_workers_end(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.fails_to_start, cluster.num_abandons = True, 2
    with pytest.raises(ChangeRefusedError, match=r"all is as it was: .* no template"):
        run(tmp_path)
    assert cluster.done[-4:] == ["deploy /m", "deploy demo", "abandon", "abandon"]


def test_model_of_an_ingress_from_a_file_is_not_changed_here(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "is_deployed_from_file", lambda: True)
    with pytest.raises(ChangeRefusedError, match="was deployed from a file"):
        run(tmp_path)
    assert cluster.done == ["config", "plan"]


def test_declaration_is_of_all_settings(cluster: FakeCluster, tmp_path: Path) -> None:
    given: list[Declared] = []
    ask = cluster.ask

    def note(method: str, *arguments: Any, timeout_s: float = 0.0) -> Any:
        if method == "prepare":
            given.append(arguments[0])
        return ask(method, *arguments)

    cluster.ask_next = note
    run(tmp_path)
    assert {declared.at_s for declared in given} == {given[0].at_s}
    assert given[0].values["model.path"] == "/m"
    assert given[0].values["workers.count"] == ClusterConfig().workers.count
