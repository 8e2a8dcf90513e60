"""Settings of a running cluster: they are what runs, or are refused in words."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.cluster.test_served_changes import settled, texts, traffic
from tests.conftest import REPOSITORY
from tests.served_cluster import COMMAND_TIMEOUT_S, ServedCluster, wait_until

__all__ = ["texts"]

OTHER_MODEL = '[model]\npath = "/other"\n'


def written(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text, "utf-8")
    return str(path)


def test_refused_settings_change_nothing(cluster: ServedCluster, tmp_path: Path) -> None:
    change = "model.path: 'demo' -> '/other'"
    says = f"needs a new generation: {change}, and: /other: no such model directory"
    before = cluster.status()
    for dry in ((), ("--dry-run",)):
        done = cluster.command("apply", "-f", written(tmp_path, OTHER_MODEL), *dry)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert says in done.stderr and "Traceback" not in done.stderr
    after = cluster.status()
    for key in ("placement_epoch", "settings"):
        assert after[key] == before[key]
    assert cluster.is_ready()


def test_settings_come_worker_by_worker_and_fail_no_request(
    cluster: ServedCluster, tmp_path: Path, texts: list[str]
) -> None:
    before = {w["worker_id"]: w["incarnation"] for w in cluster.status()["workers"]}
    file = written(tmp_path, "[workers]\nthreads_each = 1\n")
    line = "workers.threads_each: 0 -> 1 (worker by worker)\n"
    with traffic(cluster, texts):
        done = cluster.command("apply", "-f", file, "--dry-run")
        assert (done.returncode, done.stdout) == (0, line), done.stderr
        assert cluster.status()["settings"]["declared"]["workers.threads_each"] == 0
        done = cluster.command("apply", "-f", file)
        assert (done.returncode, done.stdout) == (0, f"{line}done\n"), done.stderr
    status = cluster.status()
    after = {w["worker_id"]: w["incarnation"] for w in status["workers"]}
    assert after == {worker_id: number + 1 for worker_id, number in before.items()}
    assert status["settings"]["declared"]["workers.threads_each"] == 1
    assert status["settings"]["pending"] == []
    done = cluster.command("apply", "-f", file)
    assert (done.returncode, done.stdout) == (0, "nothing to change\n"), done.stderr


def test_ingress_takes_its_settings_without_a_change_of_workers(
    cluster: ServedCluster, tmp_path: Path
) -> None:
    before = cluster.status()
    file = written(tmp_path, "[ingress]\nmax_ongoing_requests = 255\n")
    done = cluster.command("apply", "-f", file)
    assert done.returncode == 0, done.stderr
    wait_until(cluster.is_ready, "the ingress is ready")
    after = cluster.status()
    assert after["settings"]["declared"]["ingress.max_ongoing_requests"] == 255
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]


def test_scale_outlives_the_controller(cluster: ServedCluster, texts: list[str]) -> None:
    """The command waits for the next controller; no expert has too many copies afterwards."""
    pid = cluster.status()["controller_pid"]
    with traffic(cluster, texts):
        command = subprocess.Popen(
            [sys.executable, "-m", "milliways", "scale", "--workers", "4"],
            cwd=REPOSITORY,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(
            lambda: len(cluster.metric("milliways_worker_state")) > 3 * 5, "the growth begins"
        )
        os.kill(pid, signal.SIGKILL)
        stdout, stderr = command.communicate(timeout=COMMAND_TIMEOUT_S)
        assert (command.returncode, stdout) == (0, "4 workers\n"), stderr
        wait_until(settled(cluster, 4), "each expert has two holders")
    assert cluster.status()["controller_pid"] != pid
    done = cluster.command("scale", "--workers", "3")
    assert done.returncode == 0, done.stderr
    wait_until(settled(cluster, 3), "each expert has two holders again")


def test_drain_outlives_the_controller(cluster: ServedCluster) -> None:
    status = cluster.status()
    before = {w["worker_id"]: w["incarnation"] for w in status["workers"]}
    command = subprocess.Popen(
        [sys.executable, "-m", "milliways", "drain", "worker-1", "--restart"],
        cwd=REPOSITORY,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ready = 'milliways_worker_state{worker_id="worker-1",state="ready"}'
    wait_until(lambda: cluster.metrics().get(ready) != 1, "it drains")
    os.kill(status["controller_pid"], signal.SIGKILL)
    stdout, stderr = command.communicate(timeout=COMMAND_TIMEOUT_S)
    assert (command.returncode, stdout) == (0, "worker-1 was restarted\n"), stderr
    wait_until(settled(cluster, 3), "each expert has two holders")
    after = {w["worker_id"]: w["incarnation"] for w in cluster.status()["workers"]}
    assert after["worker-1"] > before["worker-1"]
