"""The transports between routers and workers, best first.

A new transport is one line in `TRANSPORTS` and one class on each side:

    router   a link in `milliways/router/links`; see `router.links.opening`
    worker   a server in `milliways/workers/servers`; see `workers.servers.transport`

The classes are named, not imported: each side loads its own, and settings can list the transports
without loading either.
"""

from importlib import import_module
from typing import Any, NamedTuple

from milliways.wire.errors import ConfigError

AUTO = "auto"


class Transport(NamedTuple):
    """A transport, and where its classes are: `module.Class` in the package of each side."""

    name: str
    link: str
    server: str


TRANSPORTS = (
    Transport("shm", "shm_link.ShmLink", "shm_server.ShmServer"),
    Transport("grpc", "grpc_link.GrpcLink", "grpc_server.GrpcServer"),
)
# What `workers.transport` may be.
SETTINGS = (AUTO, *sorted(transport.name for transport in TRANSPORTS))


def allowed_transports(setting: str) -> tuple[Transport, ...]:
    """The transports that a value of `workers.transport` allows, best first.

    Raises:
        ConfigError: there is no transport of this name.
    """
    allowed = tuple(t for t in TRANSPORTS if setting in (AUTO, t.name))
    if not allowed:
        raise ConfigError("workers.transport", setting, f"one of {', '.join(SETTINGS)}")
    return allowed


def load_class(package: str, name: str) -> Any:
    """The class `module.Class` of a package."""
    module, _, class_name = name.partition(".")
    return getattr(import_module(f"{package}.{module}"), class_name)
