"""What the server of one transport is given, and what it has to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from milliways.runtime.reactor import Reactor
from milliways.v1 import worker_pb2 as pb
from milliways.wire.exchange import ExchangeNode
from milliways.wire.limits import LinkLimits
from milliways.workers.servers.intake import RouterSessions

# Handlers of gRPC, which are not generic at run time.
RpcHandlers = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWorker:
    """The worker that is served, and the thread in which that happens."""

    reactor: Reactor
    sessions: RouterSessions
    worker_id: str
    incarnation: int
    limits: LinkLimits = field(default_factory=LinkLimits)
    # What takes rows off the rings of routers on this host, if the kernels can do that.
    node: ExchangeNode | None = None
    # Whether connections between hosts must be encrypted.
    is_encrypted: bool = False


class TransportServer:
    """The base of all servers. One that needs no listener of its own overrides `rpc_handlers`."""

    def __init__(self, worker: ServedWorker) -> None:
        self._worker = worker

    def start(self, host: str) -> None:
        """Listens, at a port of `host` if it needs one; called before Hello is answered."""

    def stop(self) -> None:
        """Accepts no more routers and breaks all connections."""

    def endpoint_for(self, caller: pb.HelloRequest) -> str | None:
        """Where the caller can connect, for its link's `open`; None if it cannot."""
        raise NotImplementedError

    def rpc_handlers(self) -> RpcHandlers:
        """Methods of WorkerService that carry this transport, by name."""
        return {}
