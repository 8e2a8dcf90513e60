"""Serve's own commands: `serve build`, `serve run`, `serve deploy`, with our arguments."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.deploy_checks import serve_problems
from tests.ray_head import RayHead
from tests.served_cluster import (
    REPOSITORY,
    child_environment,
    end,
    free_ports,
    make_stray_folder,
    run_command,
    wait_until,
)

SERVE = [sys.executable, "-m", "ray.serve.scripts"]
TIMEOUT_S = 200.0
# The environment of `serve run`, which builds the application.
SETTINGS = {"MILLIWAYS_WORKERS__LOAD_TIMEOUT_S": "3000"}


def test_build_writes_a_file_that_deploys(tmp_path: Path) -> None:
    out = tmp_path / "serve.yaml"
    done = subprocess.run(
        [*SERVE, "build", "milliways.cluster.ray.app:default_app", "-o", str(out)],
        cwd=REPOSITORY,
        env=child_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tree: dict[str, Any] = yaml.safe_load(out.read_text("utf-8"))
    assert serve_problems(tree) == []
    (application,) = tree["applications"]
    assert application["import_path"] == "milliways.cluster.ray.app:default_app"
    assert [deployment["name"] for deployment in application["deployments"]] == ["Ingress"]


@contextmanager
def serve_run(head: RayHead, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs `serve run`, which stays in the foreground."""
    with (head.folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [*SERVE, "run", "milliways.cluster.ray.app:app", *arguments],
            cwd=make_stray_folder(head.folder),
            env=head.environment | {"PYTHONPATH": ".", **SETTINGS},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            end([*psutil.Process(process.pid).children(recursive=True)])
            process.kill()
        process.wait()


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def complete(port: int, model: str = "demo") -> str:
    body = {"model": model, "prompt": "Welcome to", "temperature": 0, "max_tokens": 4}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_run_and_deploy_serve_the_same(head: RayHead, tmp_path: Path) -> None:
    # `serve run` has no option for the port.
    port, (grpc_port,) = head.start_serve(), free_ports(1)
    args: dict[str, dict[str, Any]] = {
        "workers": {"count": 2},
        "ingress": {"port": port, "grpc_port": grpc_port},
    }
    given = [
        f"{name}={yaml.safe_dump(table, default_flow_style=True)}" for name, table in args.items()
    ]
    with serve_run(head, *(text.strip() for text in given)) as process:

        def is_up() -> bool:
            assert process.poll() is None, (head.folder / "run.log").read_text("utf-8")
            return is_ready(port)

        wait_until(is_up, "serve run serves", TIMEOUT_S)
        text = complete(port)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    done = run_command(head.environment, "status", "--address", head.address)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[3:]] == ["worker-0", "worker-1"]

    assert declared(head)["workers.load_timeout_s"] == 3000.0

    file = tmp_path / "serve.yaml"
    application = {
        "name": "milliways",
        "route_prefix": "/",
        "import_path": "milliways.cluster.ray.app:app",
        "args": args,
    }
    http_options = {"host": "127.0.0.1", "port": port}
    tree = {"http_options": http_options, "applications": [application]}
    file.write_text(yaml.safe_dump(tree), "utf-8")
    serve(head, "deploy", str(file), "-a", head.dashboard)
    wait_until(lambda: is_ready(port), "serve deploy serves", TIMEOUT_S)
    assert complete(port) == text
    assert declared(head)["workers.load_timeout_s"] == 3600.0

    # What cannot be read is refused: all stays as it is.
    args["model"] = {"path": "/other"}
    file.write_text(yaml.safe_dump(tree), "utf-8")
    serve(head, "deploy", str(file), "-a", head.dashboard)
    refused = "/other: no such model directory"
    wait_until(
        lambda: refused in serve(head, "status", "-a", head.dashboard), "it is refused", TIMEOUT_S
    )
    assert is_ready(port)
    assert complete(port) == text
    assert declared(head)["model.path"] == "demo"

    # Another name needs other workers. Serve deploys it when they are complete.
    args["model"] = {"name": "other"}
    file.write_text(yaml.safe_dump(tree), "utf-8")
    serve(head, "deploy", str(file), "-a", head.dashboard)
    wait_until(lambda: serves(port, "other"), "other workers serve", TIMEOUT_S)
    assert complete(port, "other") == text
    assert declared(head)["model.name"] == "other"


def serves(port: int, model: str) -> bool:
    models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).json()["data"]
    return [served["id"] for served in models] == [model]


def declared(head: RayHead) -> dict[str, Any]:
    """The settings that the cluster has."""
    done = run_command(head.environment, "status", "--json", "--address", head.address)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["settings"]["declared"]


def serve(head: RayHead, *arguments: str) -> str:
    """Runs one of Serve's commands."""
    done = subprocess.run(
        [*SERVE, *arguments],
        cwd=REPOSITORY,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
