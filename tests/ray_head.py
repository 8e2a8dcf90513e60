"""A bare Ray for tests: a process of its own, on the loopback address, that says what it holds.

Each line that it reads is a question, each line that it writes an answer in JSON.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.served_cluster import REPOSITORY, child_environment, end, free_ports

SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True, slots=True)
class RayHead:
    """The process, seen from the tests."""

    process: "subprocess.Popen[str]"
    environment: dict[str, str]
    folder: Path
    address: str
    dashboard: str
    serve_port: int

    def ask(self, question: str) -> Any:
        return _ask(self.process, question)

    def start_serve(self) -> int:
        """Starts Serve unless it runs; returns its port."""
        self.ask(f"serve {self.serve_port}")
        return self.serve_port

    def holds(self) -> dict[str, list[str]]:
        """Names of the existing actors and placement groups."""
        return self.ask("holds")


@contextmanager
def ray_head(folder: Path, num_cpus: int = 64) -> Iterator[RayHead]:
    """Starts a Ray, and ends it with all its processes."""
    dashboard_port, serve_port = free_ports(2)
    environment = child_environment(folder, **SETTINGS)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.ray_head", str(num_cpus), str(dashboard_port)],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            address = _ask(process, "address")
            dashboard = f"http://127.0.0.1:{dashboard_port}"
            environment |= {"RAY_ADDRESS": address, "RAY_DASHBOARD_ADDRESS": dashboard}
            yield RayHead(process, environment, folder, address, dashboard, serve_port)
        finally:
            processes = [psutil.Process(process.pid)]
            processes += processes[0].children(recursive=True)
            process.communicate("end\n", timeout=60)
            _, left = psutil.wait_procs(processes, timeout=10)
            end(left)


def _ask(process: "subprocess.Popen[str]", question: str) -> Any:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{question}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _holds() -> dict[str, list[str]]:
    from ray.util import list_named_actors, placement_group_table

    actors: Any = list_named_actors(all_namespaces=True)
    groups: Any = placement_group_table()
    return {
        "actors": sorted(actor["name"] for actor in actors),
        "groups": sorted(g["name"] for g in groups.values() if g["state"] != "REMOVED"),
    }


def _start_serve(port: int) -> bool:
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return True


def _start_ray(num_cpus: int, dashboard_port: int) -> str:
    import ray

    context: Any = ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard_port,
        object_store_memory=100 << 20,
        log_to_driver=False,
        _temp_dir=tempfile.mkdtemp(prefix="mw-"),
        _node_ip_address="127.0.0.1",
    )
    return context.address_info["gcs_address"]


def run(num_cpus: int, dashboard_port: int) -> None:
    """Answers requests until it receives any other line, or its standard input closes."""
    import ray

    try:
        address = _start_ray(num_cpus, dashboard_port)
    except Exception:
        # A busy machine needs up to half a minute until Ray's own processes are up.
        ray.shutdown()
        address = _start_ray(num_cpus, dashboard_port)
    for line in sys.stdin:
        match line.split():
            case ["address"]:
                answer: Any = address
            case ["holds"]:
                answer = _holds()
            case ["serve", port]:
                answer = _start_serve(int(port))
            case _:
                break
        print(json.dumps(answer), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
