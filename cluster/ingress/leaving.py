"""How an ingress replica leaves: it takes no new request, and lets its streams end.

Steps:

1. Health checks say that it does not serve. The gRPC server closes its port, tells its clients to
   connect elsewhere (GOAWAY), and goes on with the calls that it has. Ray Serve sends no new HTTP
   requests here, at once or after `open_s` (`cluster.ray.leaving_replica`).
2. From then on requests have `grace_s` to end.
3. The source of tokens is closed. A request that still runs ends with a `LeavingError`: a stream as
   an error with the cursor at which another replica goes on, any other as 503.
"""

import asyncio
import logging
from typing import Protocol

from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer

logger = logging.getLogger(__name__)

# How long clients may take to receive the error that ends their request.
LAST_ERRORS_S = 5.0


class ClosableSource(Protocol):
    """A source of tokens whose streams can be ended."""

    async def close(self) -> None:
        """Ends all streams, those that begin later included, with LeavingError."""
        ...


async def leave(
    ingress: Ingress,
    server: IngressGrpcServer | None,
    source: ClosableSource,
    grace_s: float,
    open_s: float = 0.0,
) -> None:
    """Returns when no request runs here any more. `server` is None if it was not started yet.

    New HTTP requests may come for `open_s`. Later than `grace_s` they are refused, and clients
    ask again.
    """
    logger.info("leaving; %d requests run", ingress.num_ongoing)
    ingress.readiness.drain("the server is stopping")
    stopping = asyncio.create_task(_stop(server, grace_s + LAST_ERRORS_S))
    await asyncio.sleep(min(open_s, grace_s))
    if not await ingress.try_become_idle(grace_s):
        logger.warning("%d requests run after %g s", ingress.num_ongoing, grace_s)
    await source.close()
    await ingress.try_become_idle(LAST_ERRORS_S)
    await stopping


async def _stop(server: IngressGrpcServer | None, grace_s: float) -> None:
    if server is not None:
        await server.stop(grace_s)
