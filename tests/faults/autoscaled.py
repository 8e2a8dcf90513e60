"""A cluster on nodes that Ray's autoscaler brings up and takes away: run in a namespace of its own.

    unshare --pid --fork --kill-child --mount-proc python -m tests.faults.autoscaled FOLDER

The head offers no worker a place, so every node here was asked for by a placement group of the
controller. Nodes are faked as processes, which the end of the namespace ends. Prints JSON.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.under_load import (
    OnNodes,
    complaints_under_load,
    serving_on,
    several_nodes,
)
from tests.served_cluster import free_ports, run_command, wait_until

HOST = "127.0.0.1"
OBJECT_STORE_BYTES = 100 << 20
IDLE_TIMEOUT_S = 5
START_TIMEOUT_S = 120.0
SCALE_TIMEOUT_S = 240.0


def autoscaling_config(gcs_address: str) -> dict[str, Any]:
    """An autoscaler config with one type of node, and no such node at first."""
    return {
        "cluster_name": "fake",
        "max_workers": 6,
        "idle_timeout_minutes": IDLE_TIMEOUT_S / 60,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs_address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "head": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 0, "place": 1, "object_store_memory": OBJECT_STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 6,
            },
        },
        "head_node_type": "head",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def start_head(folder: Path, environment: dict[str, str]) -> str:
    """Starts a Ray with an autoscaler; yields its address."""
    (port,) = free_ports(1)
    address = f"{HOST}:{port}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(autoscaling_config(address)), "utf-8")
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        f"--node-ip-address={HOST}",
        f"--port={port}",
        f"--autoscaling-config={config}",
        "--num-cpus=4",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-dashboard=false",
        "--disable-usage-stats",
        f"--temp-dir={folder / 't'}",
    ]
    subprocess.run(
        command,
        env=environment | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"},
        check=True,
        timeout=START_TIMEOUT_S,
        stdout=subprocess.DEVNULL,
    )
    return address


def scale(served: OnNodes, num_workers: int) -> None:
    done = run_command(
        served.environment,
        *("scale", "--workers", str(num_workers), "--address", served.address),
        timeout_s=SCALE_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr


def nodes_of(served: OnNodes) -> set[str]:
    """The workers' nodes; empty unless all workers are ready."""
    workers = served.workers()
    is_ready = all(worker["state"] == "ready" for worker in workers)
    return {worker["node"] for worker in workers} if is_ready else set()


def num_nodes(served: OnNodes) -> int:
    """Number of living nodes that offer places for workers."""
    script = "import ray; ray.init(address='auto', log_to_driver=False);"
    script += "print(sum(n['Alive'] and 'place' in n['Resources'] for n in ray.nodes()))"
    environment = served.environment | {"RAY_ADDRESS": served.address}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    folder = Path(sys.argv[1])
    environment = several_nodes(folder)
    address = start_head(folder, environment)
    with serving_on(address, HOST, environment, folder) as served:
        report: dict[str, Any] = {"began_on": len(nodes_of(served))}
        report["grown"] = complaints_under_load(
            served.endpoint, lambda: scale(served, 4), lambda: len(nodes_of(served)) == 4
        )
        report["grew_to"] = num_nodes(served)
        report["shrunk"] = complaints_under_load(
            served.endpoint, lambda: scale(served, 2), lambda: len(nodes_of(served)) == 2
        )
        wait_until(lambda: num_nodes(served) == 2, "idle nodes are given back", SCALE_TIMEOUT_S)
        report["shrank_to"] = num_nodes(served)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
