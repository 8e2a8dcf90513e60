"""Several Ray nodes on this machine, in a process of its own: prints where they are, then waits.

python -m tests.faults.ray_nodes NUM_WORKER_NODES
"""

# Ray's own types are unknown in part.
# pyright: basic

import json
import sys
from typing import Any

from ray.cluster_utils import Cluster

from tests.faults.under_load import HEALTH_CHECKS

OBJECT_STORE_BYTES = 100 << 20


def main() -> None:
    head: dict[str, Any] = {
        "num_cpus": 4,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_system_config": HEALTH_CHECKS,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [
        cluster.add_node(num_cpus=0, resources={"place": 2}, object_store_memory=OBJECT_STORE_BYTES)
        for _ in range(int(sys.argv[1]))
    ]
    raylets = {node.node_id: node.all_processes["raylet"][0].process.pid for node in nodes}
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    head_node: Any = cluster.head_node
    for line in sys.stdin:
        match line.strip():
            case "kill-gcs":
                head_node.kill_gcs_server()
            case "start-gcs":
                head_node.start_gcs_server()
            case order:
                raise ValueError(order)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
