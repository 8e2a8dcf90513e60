"""Lets a replica leave Serve without cutting requests that Serve does not know.

Serve counts the HTTP requests of a replica. It does not know the gRPC calls, which come to a port
of our own, and it calls a replica's destructor only after the last HTTP request. So two methods of
Serve's own class are wrapped in the replica's process:

- `perform_graceful_shutdown` tells us at once that the replica leaves. From then on the replica
  rejects HTTP requests of Serve's own proxies, which send them to other replicas. Those of HAProxy
  it takes for a while.
- `get_num_ongoing_requests` counts the gRPC calls as well. Serve waits for them before it ends the
  replica, and prefers other replicas for HTTP requests.

If Serve has no such methods, the destructor still lets gRPC calls end, after all HTTP requests.
"""

# Ray's own types are unknown in part.
# pyright: basic

import logging
from collections.abc import Callable
from typing import Any

from ray.serve._private import constants, replica

logger = logging.getLogger(__name__)


def open_after_leaving_s() -> float:
    """How long HTTP requests still come after Serve has begun to end a replica.

    Serve's own proxies ask the replica first, and go elsewhere. HAProxy does not ask: it is started
    again without the replica, and until then its requests must be served here.
    """
    if not constants.RAY_SERVE_ENABLE_DIRECT_INGRESS:
        return 0.0
    return constants.RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S


def follow_replica(on_leaving: Callable[[], object], num_calls: Callable[[], int]) -> None:
    """Wraps the methods of the only replica in this process.

    Both functions are called in Serve's thread: `on_leaving` once or more often, when Serve wants
    the replica to leave; `num_calls` returns the number of gRPC calls that run.
    """
    kind: Any = getattr(replica, "Replica", None)
    shut_down = getattr(kind, "perform_graceful_shutdown", None)
    count = getattr(kind, "get_num_ongoing_requests", None)
    if shut_down is None or count is None:
        logger.warning("this version of Serve does not count gRPC calls")
        return

    async def perform_graceful_shutdown(self: Any) -> None:
        self._quiescing = True
        on_leaving()
        await shut_down(self)

    def get_num_ongoing_requests(self: Any) -> int:
        return count(self) + num_calls()

    kind.perform_graceful_shutdown = perform_graceful_shutdown
    kind.get_num_ongoing_requests = get_num_ongoing_requests
