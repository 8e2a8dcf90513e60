"""A start that cannot succeed ends soon, names the reason, and leaves nothing behind."""

import re
import socket
from pathlib import Path

import pytest

from tests.ray_head import RayHead
from tests.served_cluster import child_environment, free_ports, run_command


def refused(environment: dict[str, str], *arguments: str) -> str:
    """The last line of a `milliways serve` that must fail."""
    done = run_command(environment, "serve", *arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def ports() -> list[str]:
    http_port, grpc_port = free_ports(2)
    return ["--port", str(http_port), "--grpc-port", str(grpc_port)]


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_port_in_use_is_named_before_anything_starts(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused(child_environment(tmp_path), *ports(), option, port)
    assert said.startswith(f"milliways: {option} {port}: cannot listen on 127.0.0.1:{port}: ")


def test_missing_model_is_named_before_anything_starts(tmp_path: Path) -> None:
    said = refused(child_environment(tmp_path), *ports(), "--model", "/no/such/model")
    assert said == "milliways: /no/such/model: no such model directory"


def test_worker_without_a_node_is_named_with_what_it_waits_for(
    head: RayHead, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[workers]\ncount = 2\nstart_timeout_s = 1.0\n")
    given = ["--address", head.address, "--config", str(config), "--gpus-per-worker", "1"]
    said = refused(head.environment, *ports(), *given)
    missing = "a node with 1 CPU and 1 GPU (the largest has 0 GPU)"
    assert "not up within 1 s" in said
    for worker_id in ("worker-0", "worker-1"):
        assert f"{worker_id} waits for {missing}" in said
    assert head.holds() == {"actors": [], "groups": []}


def test_plan_that_does_not_fit_is_refused_with_its_arithmetic(
    head: RayHead, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[workers]\ncount = 2\nmemory_gb_each = 0.001\n")
    said = refused(head.environment, *ports(), "--address", head.address, "--config", str(config))
    assert re.fullmatch(r"milliways: needs 4\.\d MB, has 2 x 0.001 GB: 2\.\d MB short", said)
    assert head.holds() == {"actors": [], "groups": []}


def test_serve_that_listens_elsewhere_is_named(head: RayHead) -> None:
    port = head.start_serve()
    said = refused(head.environment, *ports(), "--address", head.address)
    assert f"already listens on 127.0.0.1:{port}: set --host and --port" in said
    # We did not start this Serve, so it must still run.
    assert "SERVE_CONTROLLER_ACTOR" in head.holds()["actors"]
    assert head.holds()["groups"] == []


def test_address_without_a_ray_is_named(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    environment = child_environment(tmp_path, RAY_AUTH_MODE="disabled")
    said = refused(environment, *ports(), "--address", f"127.0.0.1:{port}")
    assert said.startswith(f"milliways: no Ray cluster answers at 127.0.0.1:{port}")
