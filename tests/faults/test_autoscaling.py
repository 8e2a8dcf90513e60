"""Ray's autoscaler adds nodes when a placement needs them, and removes idle ones."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.served_cluster import child_environment, short_folder

# A PID namespace: its processes die with it, and see no process outside that they could hit.
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
TIMEOUT_S = 550


def can_unshare() -> bool:
    try:
        done = subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.slow
def test_nodes_start_when_a_placement_needs_them_and_stop_when_idle() -> None:
    if not can_unshare():
        pytest.skip("needs namespaces of its own, as root")
    with short_folder() as folder:
        done = subprocess.run(
            [*NAMESPACE, sys.executable, "-m", "tests.faults.autoscaled", str(folder)],
            cwd=REPOSITORY,
            env=child_environment(folder),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {
        "began_on": 3,
        "grown": [],
        "grew_to": 4,
        "shrunk": [],
        "shrank_to": 2,
    }
