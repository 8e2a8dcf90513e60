"""The status of a cluster as JSON, as metrics and as a table; and nothing of Ray's in it."""

# Ray's own types are unknown in part.
# pyright: basic

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest

from milliways.cluster.cli.commands import running_controller, status
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.cluster.ingress.worker_metrics import render_metrics
from milliways.cluster.ray.worker_reports import status_of
from milliways.wire.status import from_json, to_json
from milliways.wire.view import WorkerState
from tests.statuses import ANSWERING, AS_JSON, AS_METRICS, CLUSTER, SILENT

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

    controller = SimpleNamespace(status=SimpleNamespace(remote=lambda: CLUSTER))
    monkeypatch.setattr("milliways.cluster.ray.cluster.join", join)
    monkeypatch.setattr(
        "milliways.cluster.ray.start_controller.find_controller", lambda: controller
    )
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.shutdown", lambda: print(NEWS))
    monkeypatch.setattr(running_controller, "be_quiet", lambda: None)
    monkeypatch.setattr(running_controller, "head_for", lambda address: None)
    status.run(Namespace(address="127.0.0.1:1", json=True))
    out, err = capsys.readouterr()
    assert json.loads(out) == AS_JSON
    assert err.count(NEWS) == 3


def test_json_has_every_figure_under_its_name_and_comes_back() -> None:
    assert to_json(CLUSTER) == AS_JSON
    assert from_json(json.loads(json.dumps(AS_JSON))) == CLUSTER


def test_metrics_have_their_names_labels_and_values() -> None:
    lines = render_metrics(CLUSTER).splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("#")) == AS_METRICS
    assert sum(line.startswith("# TYPE") for line in lines) == 20


def test_table_says_what_of_the_settings_is_not_so_yet() -> None:
    assert status.format_status(CLUSTER).splitlines()[1] == (
        "settings: pending: workers.count: 2 declared, 1 ready, not yet confirmed by worker-0"
    )
    done = replace(
        CLUSTER.settings, pending=(), unconfirmed=(), problem="needs a new generation: …"
    )
    says = "settings: as declared (needs a new generation: …)"
    assert status.format_settings(done) == says


def test_table_has_a_line_for_each_worker() -> None:
    alone = replace(CLUSTER, generations=CLUSTER.generations[1:])
    _, _, names, answering, lost = status.format_status(alone).splitlines()
    assert names.split()[-4:] == ["experts", "kv", "tok/s", "transports"]
    links = "worker-0 direct, worker-1 none: opening  copies 24 to worker-1"
    assert answering.endswith(f" 0-1       3       19/20     1.2  {links}")
    lost = " ".join(lost.split())
    assert lost == "worker-1 3 0 lost none yet - 0 - - waits for its restart in 1 s"


def test_table_names_both_generations_while_there_are_two() -> None:
    assert status.format_status(CLUSTER).splitlines()[-2:] == [
        "generation 1: model small, 3 of 3 workers ready; ends when its requests have ended",
        "generation 2: model demo, 1 of 2 workers ready; serves",
    ]


def test_controller_says_of_a_lost_worker_what_it_knows() -> None:
    record = WorkerRecord("worker-1", incarnation=3, last_error="it died", num_quick_deaths=1)
    record.move(WorkerState.LOST)
    assert status_of(record, "its restart in 1 s", record.last_error, None) == SILENT


def test_answer_of_a_worker_stands_beside_what_the_controller_knows() -> None:
    record = WorkerRecord("worker-0", incarnation=2)
    worker = status_of(record, "", "", ANSWERING.process)
    assert (worker.process, worker.state) == (ANSWERING.process, "loading")
