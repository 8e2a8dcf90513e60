"""Keeps Serve's replicas off the network if the rest of the node is off it.

A replica has a gRPC server for other deployments, which Serve binds to all addresses. If the node's
address is the loopback address, that server must listen there as well. Serve has no setting for it.
"""

# Ray's own types are unknown in part.
# pyright: basic

import logging
from typing import Any

import ray
from ray.serve._private import replica

logger = logging.getLogger(__name__)

_NAME = "add_port_to_grpc_server"
_ANY_ADDRESS = "[::]:0"
_LOOPBACK_ADDRESS = "127.0.0.1:0"


def bind_replicas_to_loopback() -> None:
    """Changes Serve in a replica's process, before its server opens, on loopback nodes only."""
    module: Any = replica
    original: Any = getattr(module, _NAME, None)
    if original is None or getattr(original, "is_ours", False):
        return

    def add_port(server: Any, address: str) -> int:
        if address == _ANY_ADDRESS and ray.util.get_node_ip_address() == "127.0.0.1":
            address = _LOOPBACK_ADDRESS
        return original(server, address)

    add_port.is_ours = True
    module.add_port_to_grpc_server = add_port
