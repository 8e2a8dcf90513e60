"""What Serve's HTTP proxy does with a request before anything else of Serve sees it.

Serve imports this module in the process of the proxy, if `environment.guard_proxies` or the
environment of a node names it.
"""

import uvicorn.config
from starlette.middleware import Middleware

from milliways.cluster.ingress.front import Front


def middlewares() -> list[Middleware]:
    """What Serve calls before it opens the proxy's port."""
    # Serve has no setting for it.
    protocols: dict[str, object] = uvicorn.config.HTTP_PROTOCOLS  # pyright: ignore[reportAssignmentType]
    protocols["auto"] = "milliways.cluster.ingress.http_protocol:NoUpgradeProtocol"
    # pyright does not know that a class with such a constructor is a middleware.
    return [Middleware(Front)]
