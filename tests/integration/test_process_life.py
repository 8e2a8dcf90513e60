"""A process that serves, without a cluster: what ends it, in which order, with which code."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

TIMEOUT_S = 60.0
PROGRAM = """
import sys, time
from milliways.cluster.cli.messages import say
from milliways.cluster.cli.process_life import ProcessLife
from milliways.cluster.cli.stop_signals import Wish
from milliways.wire.errors import RayGoneError, StartupError

life = ProcessLife()

def hang():
    say("hangs")
    time.sleep(600)

def fail():
    raise StartupError("no room")

def bug():
    raise ZeroDivisionError("a bug")

def lose_ray():
    def check():
        raise RayGoneError("the raylet is gone")
    life.guard(check)
    time.sleep(600)

def serve():
    life.is_serving = True
    say("serves")
    life.stopped.wait()
    if life.wish is Wish.FINISH:
        say("finishes")
        time.sleep({finish_s})

life.run({work}, lambda: say("ends"))
"""


@contextmanager
def running(work: str, finish_s: float = 0.0) -> Iterator["subprocess.Popen[str]"]:
    code = PROGRAM.format(work=work, finish_s=finish_s)
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    return process.stderr.readline().strip()


def rest_of(process: "subprocess.Popen[str]") -> tuple[list[str], int]:
    """What it still says, and its exit code."""
    _, said = process.communicate(timeout=TIMEOUT_S)
    return said.splitlines(), process.returncode


@pytest.mark.parametrize(
    ("work", "says"),
    [("fail", "milliways: no room"), ("lose_ray", "milliways: the raylet is gone")],
)
def test_reason_of_an_end_is_said_last(work: str, says: str) -> None:
    with running(work) as process:
        said, code = rest_of(process)
    assert said[-3:] == ["stopping …", "ends", says]
    assert code == 1


def test_bug_ends_it_with_a_traceback() -> None:
    with running("bug") as process:
        said, code = rest_of(process)
    assert (said[-1], code) == ("ZeroDivisionError: a bug", 1)
    assert "ends" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_work_that_hangs_does_not_keep_a_signal_from_ending_it(number: int) -> None:
    with running("hang") as process:
        assert line_of(process) == "hangs"
        process.send_signal(number)
        assert rest_of(process) == (["stopping …", "ends"], 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_that_serves_finishes_first(number: int) -> None:
    with running("serve") as process:
        assert line_of(process) == "serves"
        process.send_signal(number)
        assert rest_of(process) == (["finishes", "stopping …", "ends"], 0)


def test_second_signal_waits_for_nothing() -> None:
    with running("serve", finish_s=600) as process:
        assert line_of(process) == "serves"
        process.send_signal(signal.SIGTERM)
        assert line_of(process) == "finishes"
        process.send_signal(signal.SIGINT)
        assert rest_of(process) == (["stopping …", "ends"], 128 + signal.SIGINT)
