"""A whole run of `milliways chaos`, against a fake cluster."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from milliways.benchmarks.chaos import injectors, trial
from milliways.benchmarks.chaos.answers import Answer, Outcome
from milliways.benchmarks.chaos.faults import DAMAGES_FILES, Fault
from milliways.benchmarks.chaos.report import Report
from milliways.benchmarks.chaos.requests import draw_requests
from milliways.benchmarks.chaos.run import LoadSize, report_of
from milliways.benchmarks.chaos.trial import Plan, Trial
from milliways.benchmarks.chaos.victims import Place, WorkerFacts
from milliways.wire.view import ClusterView, Member, WorkerState

SIZE = LoadSize(num_requests=1, num_clients=1, max_tokens=2)
REQUESTS = draw_requests(SIZE.num_requests, SIZE.max_tokens, seed=1)
PLACE = Place(name="w0", node_id="n", pid=7)


class Time:
    """A clock that moves only when the code sleeps."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds


class FakeActuator:
    """One process of each kind. A killed one comes back after a while, `num_healed` times."""

    def __init__(self, heals_after_s: float, num_healed: int = 1000) -> None:
        self.kills: list[float] = []
        self.time = Time()
        self._heals_after_s = heals_after_s
        self._num_healed = num_healed
        self._victim = PLACE
        # The files of a checkpoint, and what was in them each time a worker was asked.
        self.model_dir: Path | None = None
        self.seen: list[dict[str, bytes]] = []
        # How many replicas of the ingress were asked for, each time.
        self.deployed: list[int] = []

    def workers(self) -> Sequence[WorkerFacts]:
        return [WorkerFacts(place=PLACE, num_experts=1, num_layers=1, is_router=True)]

    def controller(self) -> Place:
        return PLACE

    def ingress(self) -> Sequence[Place]:
        return self._endpoints("ingress")

    def proxies(self) -> Sequence[Place]:
        return self._endpoints("proxy")

    def view(self) -> ClusterView:
        member = Member(
            worker_id="w0",
            incarnation=1,
            address="",
            state=WorkerState.LOST if self._is_away("w0") else WorkerState.READY,
        )
        return ClusterView(placement_epoch=len(self.kills), members={"w0": member})

    def send(self, place: Place, number: signal.Signals) -> None:
        assert number is signal.SIGKILL
        self._victim = place
        self.kills.append(self.time.monotonic())

    def limit_files(self, place: Place, max_bytes: int | None) -> None:
        raise AssertionError

    def deploy_ingress(self, num_replicas: int) -> None:
        self.deployed.append(num_replicas)

    def ckpt_dir(self) -> Path:
        assert self.model_dir is not None
        return self.model_dir

    def file_fault_of(self, place: Place) -> str:
        assert self.model_dir is not None
        now = {path.name: path.read_bytes() for path in self.model_dir.iterdir()}
        self.seen.append(now)
        return "worker-0 cannot load: a file"

    def drop_replies(self, place: Place, count: int) -> int:
        raise AssertionError

    def _endpoints(self, name: str) -> Sequence[Place]:
        # A process that comes back has another process id.
        place = Place(name=name, node_id="n", pid=100 + len(self.kills))
        return [] if self._is_away(name) else [place]

    def _is_away(self, name: str) -> bool:
        return bool(self.kills and self._victim.name == name) and (
            len(self.kills) > self._num_healed
            or self.time.monotonic() < self.kills[-1] + self._heals_after_s
        )


class Load:
    """One answer without faults, and the same answer under faults."""

    def run_once(self) -> list[Outcome]:
        return [Outcome(request_index=0, started_s=0.0, ended_s=1.0, answer=Answer.of(REQUESTS[0]))]

    def start(self, wanted: Mapping[int, Answer]) -> None:
        assert list(wanted) == [0]

    def stop(self) -> list[Outcome]:
        return self.run_once()


def run(
    actuator: FakeActuator,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault = Fault.KILL_ROUTER,
    **plan: Any,
) -> Report:
    for module in (trial, injectors):
        monkeypatch.setattr(module, "time", actuator.time)
    load: Any = Load()
    said: list[str] = []
    wanted = Plan(faults=(fault,), seed=1, **plan)
    heard = Trial(REQUESTS, load, actuator, said.append).run(wanted)
    return report_of(wanted, SIZE, heard, ended=[])


def test_scheduled_faults_do_not_wait_for_recovery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actuator = FakeActuator(heals_after_s=12.0)
    report = run(actuator, monkeypatch, duration_s=21.0, every_s=5.0)
    assert len(actuator.kills) == 4
    # The cluster did not recover in between: the same recovery at the end counts for all.
    recoveries_s = sorted(report.rows[-1].recoveries_s)
    assert len(recoveries_s) == 4 and report.holds
    assert recoveries_s == pytest.approx([12.0, 17.0, 22.0, 27.0], abs=0.2)


def test_each_fault_has_its_own_recovery_if_there_is_time_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = run(FakeActuator(heals_after_s=2.0), monkeypatch, duration_s=21.0, every_s=5.0)
    assert len(report.rows[-1].recoveries_s) == 4
    assert report.rows[-1].recoveries_s == pytest.approx([2.0] * 4, abs=0.2)


def test_fault_without_recovery_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    actuator = FakeActuator(heals_after_s=2.0, num_healed=3)
    report = run(actuator, monkeypatch, duration_s=21.0, every_s=5.0)
    assert report.rows[-1].num_not_recovered == 1
    assert not report.holds


@pytest.mark.parametrize("fault", [Fault.KILL_INGRESS, Fault.KILL_PROXY])
@pytest.mark.parametrize("every_s", [None, 5.0])
def test_cluster_is_restored_when_as_many_processes_serve_clients(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, every_s: float | None
) -> None:
    actuator = FakeActuator(heals_after_s=3.0)
    report = run(actuator, monkeypatch, fault, duration_s=16.0, every_s=every_s)
    assert report.holds and report.rows[-1].name == "all"
    assert report.rows[-1].recoveries_s == pytest.approx([3.0] * len(actuator.kills), abs=0.2)


@pytest.mark.parametrize("fault", [Fault.KILL_INGRESS, Fault.KILL_PROXY])
def test_missing_ingress_or_proxy_breaks_the_promise(
    monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    actuator = FakeActuator(heals_after_s=3.0, num_healed=0)
    assert not run(actuator, monkeypatch, fault, duration_s=5.0).holds


@pytest.mark.parametrize("fault", sorted(DAMAGES_FILES, key=lambda fault: fault.value))
def test_files_are_damaged_while_a_worker_starts_and_whole_again_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault
) -> None:
    ckpt_dir = tmp_path / "ckpt-0"
    ckpt_dir.mkdir()
    for number in range(6):
        (ckpt_dir / f"tensor{number:05d}_000").write_bytes(bytes([number]) * (600 + number % 2))
    before = {path.name: path.read_bytes() for path in ckpt_dir.iterdir()}
    actuator = FakeActuator(heals_after_s=2.0)
    actuator.model_dir = ckpt_dir
    report = run(actuator, monkeypatch, fault, duration_s=1.0)
    assert report.holds and len(actuator.kills) == len(actuator.seen) > 0
    for seen in actuator.seen:
        differing = {name for name, content in before.items() if seen.get(name) != content}
        assert len(differing) >= 3
    assert {path.name: path.read_bytes() for path in ckpt_dir.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-0"]


@pytest.mark.parametrize(
    ("fault", "wanted"), [(Fault.REDEPLOY, [1]), (Fault.INGRESS_LEAVES, [2, 1])]
)
def test_planned_changes_of_the_ingress(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, wanted: list[int]
) -> None:
    actuator = FakeActuator(heals_after_s=2.0)
    assert run(actuator, monkeypatch, fault, duration_s=1.0).holds
    assert actuator.deployed[: len(wanted)] == wanted
