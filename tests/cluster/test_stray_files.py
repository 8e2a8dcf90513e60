"""Milliways works in any directory, whatever files lie there: only `milliways` is a name of ours.

The shared cluster was started in such a directory, and so is `serve run` in its own test.
"""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.served_cluster import COMMAND_TIMEOUT_S, ServedCluster

SCRIPT = [str(Path(sys.executable).with_name("milliways"))]
MODULE = [sys.executable, "-m", "milliways"]
COMMANDS = {
    "--version": "milliways ",
    "plan --model demo --workers 2x1GB": "worker",
    "generate Welcome --max-tokens 1 --temperature 0": "\n",
    "status": "worker-0",
}


def run_beside_strays(cluster: ServedCluster, command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=cluster.working_folder,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_strays_are_what_a_program_there_would_import(cluster: ServedCluster) -> None:
    """Otherwise the tests here would pass without a stray in the way."""
    assert cluster.environment["PYTHONPATH"] == "."
    for name in ("model", "router", "workers"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            cwd=cluster.working_folder,
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"the stray {name}" in done.stderr


def test_cluster_started_beside_strays_serves(cluster: ServedCluster) -> None:
    assert os.path.realpath(f"/proc/{cluster.process.pid}/cwd") == str(cluster.working_folder)
    body = {"model": "demo", "prompt": "Welcome to", "temperature": 0, "max_tokens": 4}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["choices"][0]["text"] == " Lumen, the l"
    assert "stray" not in cluster.log


@pytest.mark.parametrize("program", [SCRIPT, MODULE], ids=["script", "module"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_beside_strays(
    cluster: ServedCluster, program: list[str], command: str
) -> None:
    assert COMMANDS[command] in run_beside_strays(cluster, [*program, *command.split()])
