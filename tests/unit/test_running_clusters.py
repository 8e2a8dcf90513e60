"""Notes of running clusters: whose owner lives, and whose does not."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milliways.cluster.ray import running_clusters
from milliways.cluster.ray.running_clusters import (
    Note,
    Owner,
    RunningCluster,
    find_running,
    find_running_by,
    notes_dir,
    owner_of,
    this_machine,
)

# Writes a note, says so, and waits for the end of its input.
SERVE = """
import sys
from milliways.cluster.ray.running_clusters import Note, RunningCluster, this_machine
machine, boot = this_machine()
note = Note(RunningCluster(pid={pid}, address="a", token="t", http="h", grpc="g",
                           machine=machine, boot=boot))
print(note.path, flush=True)
sys.stdin.read()
"""
DEAD_PID = 2**22 + 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def cluster_of(pid: int) -> RunningCluster:
    machine, boot = this_machine()
    return RunningCluster(
        pid=pid, address="a", token="t", http="h", grpc="g", machine=machine, boot=boot
    )


def test_note_is_found_until_it_is_deleted() -> None:
    note = Note(cluster_of(os.getpid()))
    assert note.path.stat().st_mode & 0o077 == 0
    assert find_running() == find_running_by(os.getpid()) == cluster_of(os.getpid())
    note.delete()
    assert find_running() is None


def test_process_that_this_namespace_does_not_know_keeps_its_note() -> None:
    code = SERVE.format(pid=DEAD_PID)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert owner_of(path) is Owner.ALIVE
        assert find_running() == cluster_of(DEAD_PID)
        process.kill()
    assert owner_of(path) is Owner.DEAD
    assert find_running() is None and not path.exists()


def test_note_of_another_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    path = notes_dir() / "1.json"
    elsewhere = dataclasses.replace(cluster_of(1), machine="elsewhere", boot="another")
    path.write_text(json.dumps(dataclasses.asdict(elsewhere)))
    assert find_running() is None and path.exists()
    # The same machine after it started again.
    monkeypatch.setattr(running_clusters, "this_machine", lambda: ("elsewhere", "later"))
    assert find_running() is None and not path.exists()


def test_same_number_twice_makes_two_notes() -> None:
    first, second = Note(cluster_of(7)), Note(cluster_of(7))
    assert first.path != second.path
    assert owner_of(first.path) is owner_of(second.path) is Owner.ALIVE


def test_unreadable_note_is_left_alone() -> None:
    path = notes_dir() / "5.json"
    path.write_text('{"pid": 5')
    assert find_running() is None and path.exists()
