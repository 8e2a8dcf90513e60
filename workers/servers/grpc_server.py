"""A worker's gRPC: Hello, and one Exchange stream for each router.

It lives in the loop that the compute thread's reactor hosts: a message goes from the stream into
the core and its result back without a change of threads, and while the core computes, gRPC's own
threads go on receiving and answer pings.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.v1 import worker_pb2 as pb
from milliways.wire import codec
from milliways.wire.calls import Result
from milliways.wire.channels import add_port
from milliways.wire.limits import LinkLimits
from milliways.wire.tensors import MalformedMessageError, PayloadReader
from milliways.wire.tls import TlsSettings
from milliways.workers.servers.intake import Intake, RouterSessions

_EOF: Any = grpc.aio.EOF  # pyright: ignore
_SERVICE = "milliways.v1.WorkerService"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerIdentity:
    """What a worker says of itself when it is greeted."""

    worker_id: str
    incarnation: int
    # Of `cluster.shm.local_host_id`; empty where memory cannot be shared.
    host_id: str = ""
    # The abstract Unix socket of the shared-memory server; empty: there is none.
    socket_name: str = ""


class WorkerGrpcServer:
    """Serves a worker's data plane. Used from its reactor's thread."""

    def __init__(
        self,
        reactor: Reactor,
        sessions: RouterSessions,
        plate: ServerIdentity,
        *,
        tls: TlsSettings | None = None,
        limits: LinkLimits | None = None,
    ) -> None:
        self._reactor = reactor
        self._sessions = sessions
        self._plate = plate
        self._tls = tls or TlsSettings()
        self._limits = limits or LinkLimits()
        self._server: Any = None

    def start(self, address: str) -> Pending[str]:
        """Listens at `host:port`, port 0 for any; comes to the address with the port it has."""
        return self._reactor.run_in_loop(self._start(address))

    def stop(self, grace_s: float = 0.0) -> Pending[None]:
        """Takes no more calls; breaks the streams after `grace_s`."""
        return self._reactor.run_in_loop(self._stop(grace_s))

    async def _start(self, address: str) -> str:
        options = [*self._limits.grpc_options(), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Hello": grpc.unary_unary_rpc_method_handler(
                self._hello,
                request_deserializer=pb.HelloRequest.FromString,
                response_serializer=pb.HelloResponse.SerializeToString,
            ),
            # Without serializers: messages are bytes here, and the codec's business.
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
        }
        generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        port = add_port(self._server, address, self._tls)
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def _stop(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:
        plate = self._plate
        can_share = bool(plate.socket_name and plate.host_id == request.host_id)
        takes_shm = can_share and request.wanted != pb.TRANSPORT_GRPC
        return pb.HelloResponse(
            worker_id=plate.worker_id,
            incarnation=plate.incarnation,
            transport=pb.TRANSPORT_SHM if takes_shm else pb.TRANSPORT_GRPC,
            socket_name=plate.socket_name if takes_shm else "",
        )

    async def _exchange(self, requests: AsyncIterator[bytes], context: Any) -> None:
        stream = _Stream(self._reactor, self._sessions, context, self._limits)
        await stream.run()


class _Stream:
    """One router's stream: reads, submits, and writes results in whatever order they come."""

    def __init__(
        self, reactor: Reactor, sessions: RouterSessions, context: Any, limits: LinkLimits
    ) -> None:
        self._reactor = reactor
        self._context = context
        self._limits = limits
        self._intake = Intake(sessions, self._send)
        self._outbox: deque[bytes] = deque()
        self._is_writing = False
        self._is_taking = False
        self._has_room = asyncio.Event()

    async def run(self) -> None:
        """Until the stream breaks, or brings something that is no message."""
        context = self._context
        try:
            while (data := await context.read()) is not _EOF:
                self._take(data)
                if self._outbox and not self._is_writing:
                    await self._flush()
                while self._intake.num_open >= self._limits.max_calls_in_flight:
                    self._has_room.clear()
                    await self._has_room.wait()
        except MalformedMessageError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._intake.close()

    def _take(self, data: bytes) -> None:
        fields = codec.split_request(data)
        payload = PayloadReader(data, fields.payload_start, fields.num_payload_bytes)
        self._is_taking = True
        try:
            self._intake.take(fields, payload)
        finally:
            self._is_taking = False

    def _send(self, call_id: int, result: Result) -> None:
        self._outbox.append(codec.join(codec.encode_response(call_id, result)))
        self._has_room.set()
        # What is answered at once, the reading task writes itself: a task less to wake.
        if not self._is_writing and not self._is_taking:
            self._reactor.run_in_loop(self._flush_later())

    async def _flush(self) -> None:
        self._is_writing = True
        try:
            while self._outbox:
                await self._context.write(self._outbox.popleft())
        finally:
            self._is_writing = False

    async def _flush_later(self) -> None:
        if not self._is_writing:
            await self._flush()
