"""Two Ray nodes in two network namespaces, cut apart under load: run inside the first namespace.

    ip netns exec FIRST python -m tests.faults.partition SECOND FOLDER

The second namespace has one end of a veth pair. Prints what clients saw; exit code 0 if nothing.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.faults.under_load import HEALTH_CHECKS, complaints_under_load, serving_on
from tests.served_cluster import child_environment

FIRST_HOST, SECOND_HOST = "10.99.0.1", "10.99.0.2"
GCS_PORT = 6379
START_TIMEOUT_S = 90.0


def start_node(environment: dict[str, str], prefix: list[str], *options: str) -> None:
    """Starts a Ray node, which keeps running."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [*prefix, ray, "start", "--object-store-memory=100000000", "--disable-usage-stats"]
    subprocess.run(
        [*command, *options],
        env=environment,
        check=True,
        timeout=START_TIMEOUT_S,
        stdout=subprocess.DEVNULL,
    )


def main() -> int:
    second, folder = sys.argv[1], Path(sys.argv[2])
    checks = {f"RAY_{name}": str(value) for name, value in HEALTH_CHECKS.items()}
    environment = child_environment(folder, RAY_AUTH_MODE="disabled", **checks)
    # The parent may have set this. Here each node has an address of its own, not the loopback.
    environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    in_second = ["ip", "netns", "exec", second]
    for name in ("a", "b"):
        (folder / name).mkdir()
    start_node(
        environment,
        [],
        "--head",
        f"--node-ip-address={FIRST_HOST}",
        f"--port={GCS_PORT}",
        "--num-cpus=4",
        '--resources={"place": 2}',
        "--include-dashboard=false",
        f"--temp-dir={folder / 'a'}",
    )
    start_node(
        environment,
        in_second,
        f"--address={FIRST_HOST}:{GCS_PORT}",
        f"--node-ip-address={SECOND_HOST}",
        "--num-cpus=0",
        '--resources={"place": 1}',
    )
    with ExitStack() as stack:
        address = f"{FIRST_HOST}:{GCS_PORT}"
        served = stack.enter_context(serving_on(address, FIRST_HOST, environment, folder))
        on_nodes = {worker["worker_id"]: worker["node"] for worker in served.workers()}
        print(f"workers on {len(set(on_nodes.values()))} nodes", flush=True)
        assert len(set(on_nodes.values())) == 2, on_nodes
        # Only now, or Ray would put all workers on one side. The lost worker restarts here.
        start_node(
            environment,
            [],
            f"--address={address}",
            f"--node-ip-address={FIRST_HOST}",
            "--num-cpus=0",
            '--resources={"place": 1}',
        )
        lives = {worker["worker_id"]: worker["incarnation"] for worker in served.workers()}

        def cut() -> None:
            subprocess.run(
                [*in_second, "ip", "link", "set", os.environ["SECOND_LINK"], "down"], check=True
            )

        def is_whole() -> bool:
            now = {worker["worker_id"]: worker["incarnation"] for worker in served.workers()}
            return served.is_whole() and now != lives

        found = complaints_under_load(served.endpoint, cut, is_whole)
        print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
