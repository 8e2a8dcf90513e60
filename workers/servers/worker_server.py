"""All that a worker listens on: a gRPC server that answers Hello, and a server a transport.

gRPC lives in the event loop that the compute thread's reactor hosts: a message goes from the stream
into the core, and its result back, without a change of threads. While the core computes, gRPC's own
threads go on receiving, and answer pings.
"""

from typing import Any

import grpc

from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.v1 import worker_pb2 as pb
from milliways.wire.channels import add_port
from milliways.wire.exchange import ExchangeNode
from milliways.wire.limits import LinkLimits
from milliways.wire.tls import TlsSettings
from milliways.wire.transports import AUTO, allowed_transports, load_class
from milliways.workers.servers.intake import RouterSessions
from milliways.workers.servers.parts import PartServer, ReadHeld
from milliways.workers.servers.transport import ServedWorker, TransportServer

_SERVERS = "milliways.workers.servers"
_SERVICE = "milliways.v1.WorkerService"


class WorkerServer:
    """Serves a worker's data plane. Used in the thread of its reactor."""

    def __init__(
        self,
        reactor: Reactor,
        sessions: RouterSessions,
        *,
        worker_id: str,
        incarnation: int,
        transport: str = AUTO,
        tls: TlsSettings | None = None,
        limits: LinkLimits | None = None,
        read_held: ReadHeld | None = None,
        node: ExchangeNode | None = None,
    ) -> None:
        """`transport` is the setting `workers.transport`; `read_held` gives parts of the model.

        A `node` serves the rings of routers on this host.

        Raises:
            ConfigError: there is no such transport.
        """
        self._worker = ServedWorker(
            reactor=reactor,
            sessions=sessions,
            worker_id=worker_id,
            incarnation=incarnation,
            limits=limits or LinkLimits(),
            node=node,
            is_encrypted=tls is not None and tls.is_on,
        )
        self._tls = tls or TlsSettings()
        self._parts = None if read_held is None else PartServer(read_held)
        self._server: Any = None
        self.transports: dict[str, TransportServer] = {
            allowed.name: load_class(_SERVERS, allowed.server)(self._worker)
            for allowed in allowed_transports(transport)
        }

    def start(self, address: str) -> Pending[str]:
        """Listens at `host:port`, port 0 for any; the result is the address with its port."""
        for server in self.transports.values():
            server.start(address.rpartition(":")[0])
        return self._worker.reactor.run_in_loop(self._start(address))

    def stop(self, grace_s: float = 0.0) -> Pending[None]:
        """Accepts no more calls; breaks the streams after `grace_s`."""
        for server in self.transports.values():
            server.stop()
        return self._worker.reactor.run_in_loop(self._stop(grace_s))

    async def _start(self, address: str) -> str:
        options = [*self._worker.limits.grpc_options(), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        handlers = grpc.method_handlers_generic_handler(_SERVICE, self._handlers())
        self._server.add_generic_rpc_handlers((handlers,))
        port = add_port(self._server, address, self._tls)
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def _stop(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)

    def _handlers(self) -> dict[str, Any]:
        hello = grpc.unary_unary_rpc_method_handler(
            self._hello,
            request_deserializer=pb.HelloRequest.FromString,
            response_serializer=pb.HelloResponse.SerializeToString,
        )
        handlers: dict[str, Any] = {"Hello": hello}
        if self._parts is not None:
            handlers["ReadPart"] = self._parts.handler()
        for server in self.transports.values():
            handlers.update(server.rpc_handlers())
        return handlers

    async def _hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:
        endpoints = {
            name: endpoint
            for name, server in self.transports.items()
            if (endpoint := server.endpoint_for(request)) is not None
        }
        # Older routers read the transport and the socket, and know two transports.
        uses_shm = "shm" in endpoints and request.wanted != pb.TRANSPORT_GRPC
        return pb.HelloResponse(
            worker_id=self._worker.worker_id,
            incarnation=self._worker.incarnation,
            transport=pb.TRANSPORT_SHM if uses_shm else pb.TRANSPORT_GRPC,
            socket_name=endpoints["shm"] if uses_shm else "",
            endpoints=endpoints,
        )
