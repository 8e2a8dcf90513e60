"""`milliways chaos` against a serving cluster: all sampling modes, over HTTP and gRPC."""

import json
from collections.abc import Iterator

import pytest

from milliways.cluster.ray.running_clusters import RunningCluster
from tests.faults.leftovers import left_as_found
from tests.served_cluster import ServedCluster, run_command

NUM_WORKERS = 3
# One client for each sampling mode over HTTP and gRPC; all run at the same time.
NUM_ASKS = 14
TIMEOUT_S = 500.0


@pytest.fixture
def leaves_nothing(cluster: ServedCluster) -> Iterator[None]:
    with left_as_found(cluster):
        yield


def running(cluster: ServedCluster) -> RunningCluster:
    (note,) = (cluster.folder / "c").rglob("running/*.json")
    return RunningCluster(**json.loads(note.read_text("utf-8")))


def rows_of(cluster: ServedCluster, faults: str) -> dict[str, dict[str, int]]:
    """Runs the command, which compares each answer with the undisturbed one; returns its counts."""
    arguments = [
        *("--address", running(cluster).address),
        *("--faults", faults, "--duration", "1", "--yes"),
        *("--requests", str(NUM_ASKS), "--clients", str(NUM_ASKS), "--tokens", "64"),
    ]
    done = run_command(cluster.environment, "chaos", *arguments, timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the promise holds" in done.stdout
    table: dict[str, dict[str, int]] = {}
    for line in done.stdout.partition("\n\n")[0].splitlines():
        name, *figures = line.split()
        if name in faults.split(","):
            names = ("times", "requests", "failed", "differing", "resumed", "hit")
            table[name] = dict(zip(names, map(int, figures[: len(names)]), strict=True))
    return table


@pytest.mark.parametrize(
    "faults",
    [
        "freeze,slow,disk-full,drop-reply",
        "kill-controller,kill-expert,kill-router,stale-epoch",
        "kill-ingress,kill-proxy",
    ],
)
@pytest.mark.usefixtures("leaves_nothing")
def test_fault_under_load_costs_no_token(cluster: ServedCluster, faults: str) -> None:
    table = rows_of(cluster, faults)
    assert set(table) == set(faults.split(","))
    for row in table.values():
        assert (row["times"], row["failed"], row["differing"]) == (1, 0, 0)
        # Streams ran during the fault.
        assert row["hit"] > 0


def test_running_cluster_is_not_broken_without_consent(cluster: ServedCluster) -> None:
    address = running(cluster).address
    done = run_command(cluster.environment, "chaos", "--address", address)
    assert done.returncode == 1
    assert "--yes" in done.stderr and "kills and stops processes" in done.stderr


def test_fault_that_needs_the_worker_is_refused_at_once(cluster: ServedCluster) -> None:
    done = run_command(cluster.environment, "chaos", "--faults", "partition")
    assert done.returncode == 1
    assert "--faults = 'partition'" in done.stderr and "tests/" in done.stderr
