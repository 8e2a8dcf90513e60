"""No process of a cluster outlives it, also if its parent died first."""

import subprocess
import sys

import psutil

# Prints the process id of an orphan: its parent has ended.
ORPHAN = """
import subprocess, sys
from milliways.cluster.ray.descendants import adopt_orphans, end_descendants
adopt_orphans()
leaf = [sys.executable, "-c", "import time; time.sleep(600)"]
options = "stdout=s.DEVNULL, stderr=s.DEVNULL"
start = f"import subprocess as s; print(s.Popen({leaf}, {options}).pid)"
made = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
print(made.stdout.strip(), end_descendants(10.0), flush=True)
"""


def test_orphans_are_ended_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True, timeout=60
    )
    pid, left = done.stdout.split()
    assert left == "[]"
    assert not psutil.pid_exists(int(pid))
