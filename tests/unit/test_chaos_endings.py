"""Faults that end a cluster: what counts as a promised end, with a small program as the cluster."""

import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import psutil
import pytest

from milliways.benchmarks.chaos import endings, run
from milliways.benchmarks.chaos.answers import Answer, Outcome
from milliways.benchmarks.chaos.clients import Endpoint
from milliways.benchmarks.chaos.endings import GIVE_UP_S, GIVE_UP_TIMES, end_a_cluster
from milliways.benchmarks.chaos.faults import Fault
from milliways.benchmarks.chaos.local_cluster import LocalCluster
from milliways.benchmarks.chaos.requests import ChaosRequest, Surface, draw_requests
from milliways.benchmarks.chaos.run import LoadSize, report_of, run_endings
from milliways.benchmarks.chaos.trial import Plan
from milliways.wire.errors import StartupError

SIZE = LoadSize(num_requests=2, num_clients=2, max_tokens=3)
PLAN = Plan(faults=(), seed=1, duration_s=1.0)
REQUESTS = draw_requests(SIZE.num_requests, SIZE.max_tokens, PLAN.seed)
# Ends on SIGTERM, as `milliways serve` does; what it does then is an argument.
PROGRAM = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def end(*_):
    if "leaves" not in sys.argv:
        child.kill()
        child.wait()
    print("milliways: all requests have ended", flush=True)
    os._exit(3 if "fails" in sys.argv else 0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


class SteadyClient:
    """Answers a token at a time."""

    def send(self, request: ChaosRequest, answer: Answer) -> None:
        for number in range(3):
            for choice in answer.choices:
                choice.add([number], "a", None, "length" if number == 2 else "")
            answer.token_times_s.append(0.0)


class Cluster:
    """Replaces the cluster and its clients; keeps the patience that clients were given."""

    def __init__(self, *words: str) -> None:
        self.patience_s: list[float | None] = []
        self._words = words

    @contextmanager
    def local_cluster(self, arguments: Sequence[str]) -> Generator[LocalCluster]:
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *self._words], stdout=log, stderr=log
            )
            one = psutil.Process(process.pid)
            running: Any = Endpoint(http="", grpc="")
            cluster = LocalCluster(running, process, log)
            try:
                while "ready" not in cluster.output():
                    assert process.poll() is None
                children = one.children()
                yield cluster
            finally:
                process.kill()
                process.wait()
                for child in children:
                    if child.is_running():
                        child.kill()

    @contextmanager
    def open_clients(
        self, endpoint: Endpoint, timeout_s: float | None = None
    ) -> Generator[dict[Surface, SteadyClient]]:
        self.patience_s.append(timeout_s)
        yield dict.fromkeys(Surface, SteadyClient())


@pytest.fixture
def always_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client above is never in the middle of an answer for long."""

    def served(load: Any, num_clients: int) -> None:
        load.begin_no_more()

    monkeypatch.setattr(endings, "_wait_until_served", served)


def use(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "local_cluster", cluster.local_cluster)
    monkeypatch.setattr(endings, "open_clients", cluster.open_clients)


@pytest.mark.usefixtures("always_in_the_middle")
@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ((), []),
        (("fails",), ["ended with exit code 3, not 0"]),
        (("leaves",), ["left 1 processes"]),
    ],
)
def test_end_is_what_was_promised_or_a_complaint(
    words: Sequence[str], problems: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Cluster(*words), monkeypatch)
    ended = end_a_cluster(Fault.SIGTERM, [], REQUESTS, SIZE.num_clients)
    assert ended.ending is not None
    assert list(ended.ending.problems) == problems
    assert ended.ending.reason == "all requests have ended"
    assert report_of(PLAN, SIZE, None, [ended]).holds == (not problems)


def test_cluster_that_does_not_start_is_a_complaint_beside_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise StartupError("no room")

    monkeypatch.setattr(run, "end_a_cluster", fail)
    said: list[str] = []
    ended = run_endings((Fault.SIGTERM, Fault.KILL_RAYLET), [], PLAN, SIZE, said.append)
    report = report_of(PLAN, SIZE, None, ended)
    assert report.complaints == ("sigterm: no room", "kill-raylet: no room")
    assert not report.endings and "kill-raylet: no room" in said


def test_clients_of_a_cluster_that_dies_wait_longer_where_answers_take_longer() -> None:
    def patience_s(fault: Fault, *took_s: float) -> float | None:
        outcomes = [
            Outcome(request_index=0, started_s=1.0, ended_s=1.0 + s, answer=Answer.of(REQUESTS[0]))
            for s in took_s
        ]
        return cast(Any, endings)._patience_s(fault, outcomes)

    assert patience_s(Fault.SIGTERM, 30.0) is None
    assert patience_s(Fault.KILL_RAYLET, 0.1, 0.2) == GIVE_UP_S
    assert patience_s(Fault.KILL_RAYLET, 1.0, 30.0) == GIVE_UP_TIMES * 30.0
