"""A local Ray that does not start, and one that is gone, both without a Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from milliways.cluster.ray import cluster
from milliways.cluster.ray.cluster import START_ATTEMPTS, LocalRay
from milliways.wire.errors import RayGoneError, StartupError

Dead = list[tuple[str, int]]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Starts that each fail once more than the list says; nothing is ended."""
    made: list[Any] = []

    def init(**options: Any) -> SimpleNamespace:
        made.append(options)
        if len(made) < START_ATTEMPTS:
            raise RuntimeError("The current node timed out during startup.")
        return SimpleNamespace(address_info={"gcs_address": "127.0.0.1:7"})

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster, "end_descendants", lambda timeout_s: [])
    monkeypatch.setattr(cluster, "reap_orphans", lambda known: None)
    monkeypatch.setattr(cluster._worker, "print_to_stdstream", None)
    return made


def gone(monkeypatch: pytest.MonkeyPatch, dead: Dead) -> None:
    processes = [(name, SimpleNamespace(returncode=code, pid=1)) for name, code in dead]
    node = SimpleNamespace(dead_processes=lambda: processes, live_processes=list)
    monkeypatch.setattr(cluster._worker, "_global_node", node)


def test_slow_start_is_tried_again(attempts: list[Any], tmp_path: Path) -> None:
    assert LocalRay(tmp_path).address == "127.0.0.1:7"
    assert len(attempts) == START_ATTEMPTS
    assert {options["_temp_dir"] for options in attempts} == {str(tmp_path)}


def test_start_that_nobody_wants_is_not_tried_again(attempts: list[Any], tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not wanted"):
        LocalRay(tmp_path, is_wanted=lambda: False)
    assert len(attempts) == 1


def test_start_that_never_comes_says_how_busy_the_machine_is(
    attempts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "START_ATTEMPTS", START_ATTEMPTS - 1)
    with pytest.raises(StartupError, match=r"\(2 tries, load [\d.]+ on \d+ processors\): The curr"):
        LocalRay(tmp_path)


@pytest.mark.parametrize(
    ("dead", "says"),
    [
        ([("raylet", -9)], "Ray's raylet was killed by SIGKILL (an agent failed): the cluster"),
        ([("gcs_server", 1)], "Ray's control service (GCS) ended with code 1: the cluster ends"),
    ],
)
def test_process_that_is_gone_is_named_with_its_last_words(
    attempts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: Dead, says: str
) -> None:
    logs = tmp_path / "session_latest" / "logs"
    logs.mkdir(parents=True)
    lines = [
        "[2026-11-29 10:00:00,1 I 7 7] (raylet) main.cc:1: it starts",
        "[2026-11-29 10:00:01,2 E 7 7] (raylet) agent_manager.cc:2: an agent failed",
        "[2026-11-29 10:00:02,3 I 7 7] (raylet) main.cc:3: it ends",
    ]
    (logs / "raylet.out").write_text("\n".join(lines))
    local = LocalRay(tmp_path)
    gone(monkeypatch, dead)
    with pytest.raises(RayGoneError) as raised:
        local.check_again(5.0)
    assert str(raised.value).startswith(says)


def test_helpers_that_serve_nobody_may_end(
    attempts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone(monkeypatch, [("log_monitor", -9), ("monitor", 1)])
    LocalRay(tmp_path).check()
