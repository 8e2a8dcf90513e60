"""`milliways serve` ends when it is told to, or when its Ray is gone, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.served_cluster import (
    ServedCluster,
    end,
    files_in_shared_memory,
    serving,
    short_folder,
    wait_until,
    wait_until_ready,
)

# Only a hang takes longer. The start of Ray alone takes ten seconds and more.
OBEYS_WITHIN_S = 5.0
ENDS_WITHIN_S = 60.0


class Stream(threading.Thread):
    """A client that reads a long stream."""

    def __init__(self, cluster: ServedCluster, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.error: httpx.HTTPError | None = None
        self._url = f"{cluster.url}/v1/completions"
        body: dict[str, Any] = {"model": "demo", "prompt": "Welcome to", "stream": True, "n": 8}
        self._body = body | {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
                self.lines += [ln for ln in response.iter_lines() if ln.startswith("data: ")]
        except httpx.HTTPError as error:
            self.error = error

    @property
    def texts(self) -> list[str]:
        """The text of each choice."""
        texts = [""] * 8
        for line in self.lines[:-1]:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
        return texts


@contextmanager
def leaves_nothing(*arguments: str) -> Iterator[ServedCluster]:
    """A cluster that must have ended by itself when the block ends, with all that it made."""
    in_memory = files_in_shared_memory()
    with short_folder() as folder:
        with serving(folder, "--workers", "1", *arguments) as cluster:
            processes: list[psutil.Process] = []
            try:
                yield cluster
            finally:
                processes = cluster.processes() if cluster.process.poll() is None else []
                end(processes)
            assert processes == [], "it has not ended"
        assert list((folder / "t").iterdir()) == []
        assert not any((folder / "c").rglob("*.json"))
    assert not files_in_shared_memory() - in_memory


def ended(cluster: ServedCluster, processes: list[psutil.Process], within_s: float) -> int:
    """The exit code, once the process has ended; none of its processes may be left."""
    code = cluster.process.wait(within_s)
    _, left = psutil.wait_procs(processes, timeout=1.0)
    end(left)
    assert left == []
    assert "Traceback" not in cluster.log, cluster.log
    return code


def running_stream(cluster: ServedCluster, max_tokens: int) -> Stream:
    wait_until_ready(cluster)
    wait_until(lambda: "Ctrl-C stops it" in cluster.log, "it greets")
    stream = Stream(cluster, max_tokens)
    stream.start()
    wait_until(lambda: cluster.metric("milliways_ongoing_requests") == [1.0], "a request runs")
    return stream


def group_of(cluster: ServedCluster) -> list[psutil.Process]:
    """The processes that get a signal to the group of the command, as `timeout` sends it."""
    group = os.getpgid(cluster.process.pid)
    return [process for process in cluster.processes() if os.getpgid(process.pid) == group]


def test_sigterm_finishes_running_requests() -> None:
    with leaves_nothing("--grace", "100") as cluster:
        stream = running_stream(cluster, 200)
        processes = cluster.processes()
        for process in group_of(cluster):
            process.terminate()
        wait_until(lambda: not cluster.is_ready(), "it is not ready any more")
        if stream.is_alive():
            body = {"model": "demo", "prompt": "x", "max_tokens": 1}
            refused = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "service_unavailable_error"
        stream.join(120)
        assert stream.error is None and stream.lines[-1] == "data: [DONE]"
        # Greedy samples of one prompt are equal, and none of them is cut.
        assert len(set(stream.texts)) == 1
        assert ended(cluster, processes, ENDS_WITHIN_S) == 0


def test_second_signal_ends_at_once() -> None:
    with leaves_nothing("--grace", "1000") as cluster:
        stream = running_stream(cluster, 480)
        processes = cluster.processes()
        cluster.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "a second signal ends them now" in cluster.log, "it finishes requests")
        assert stream.is_alive()
        cluster.process.send_signal(signal.SIGTERM)
        assert ended(cluster, processes, OBEYS_WITHIN_S) == 128 + signal.SIGTERM


def test_ray_that_is_gone_ends_it_with_a_reason() -> None:
    with leaves_nothing() as cluster:
        wait_until_ready(cluster)
        processes = cluster.processes()
        (raylet,) = [process for process in processes if process.name() == "raylet"]
        raylet.kill()
        assert ended(cluster, processes, ENDS_WITHIN_S) == 1
        assert "milliways: Ray's raylet was killed by SIGKILL" in cluster.log


# Which process is there then.
MOMENTS = {"while Ray starts": "gcs_server", "while the endpoint starts": "ray::ControllerActor"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_obeyed_at_any_moment_of_the_start(moment: str) -> None:
    with leaves_nothing() as cluster:

        def has_come() -> bool:
            return MOMENTS[moment] in {name_of(process) for process in cluster.processes()}

        wait_until(has_come, moment)
        processes = cluster.processes()
        cluster.process.send_signal(signal.SIGINT)
        try:
            assert ended(cluster, processes, OBEYS_WITHIN_S) == 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"not within {OBEYS_WITHIN_S:g} s: {cluster.log}")


def name_of(process: psutil.Process) -> str:
    """The name of a process's program, or the class of its actor."""
    try:
        title = "".join(process.cmdline()[:1])
        return title.partition(".")[0] if title.startswith("ray::") else process.name()
    except psutil.Error:
        return ""
