"""Tests here share one real cluster, the fixture `cluster`."""

from pathlib import Path

import pytest

<<<<<<< HEAD
=======
from tests.ray_head import RayHead, ray_head
from tests.served_cluster import ServedCluster, end, serving, short_folder, wait_until_ready

>>>>>>> real
HERE = Path(__file__).resolve().parent
# The first test waits for the cluster: processes start, programs are compiled.
TIMEOUT_S = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
            # With xdist: one worker runs them all, so that there is one cluster.
            item.add_marker(pytest.mark.xdist_group("cluster"))
<<<<<<< HEAD
=======


@pytest.fixture(scope="session")
def cluster() -> Iterator[ServedCluster]:
    """Three workers, two replicas of each expert. Its end leaves nothing behind."""
    with short_folder() as folder:
        with serving(folder, "--workers", "3", "--expert-replicas", "2") as running:
            wait_until_ready(running)
            yield running
            check_end(running)
        assert list((folder / "t").iterdir()) == []
        assert not any((folder / "c").rglob("*.json"))


@pytest.fixture(scope="session")
def head() -> Iterator[RayHead]:
    """A Ray without anything of ours in it."""
    with short_folder() as folder, ray_head(folder) as running:
        yield running


def check_end(running: ServedCluster) -> None:
    """Ctrl-C ends every process, in time, and without complaint."""
    processes = running.processes()
    in_memory = files_in_shared_memory()
    left = running.stop(processes)
    end(left)
    assert left == []
    assert running.process.returncode == 0, running.log
    assert not files_in_shared_memory() - in_memory
    # A process that ends writes no more, so this is all it had to say.
    assert "Traceback" not in running.log, running.log


def files_in_shared_memory() -> set[str]:
    """Names in memory that outlive those who made them."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
>>>>>>> real
