"""The server of the gRPC transport: one Exchange stream for each router."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc

from milliways.v1 import worker_pb2 as pb
from milliways.wire import codec
from milliways.wire.calls import Result
from milliways.wire.tensors import MalformedMessageError, PayloadReader
from milliways.workers.servers.carried_rings import CarriedRings
from milliways.workers.servers.intake import Intake
from milliways.workers.servers.transport import RpcHandlers, ServedWorker, TransportServer

_EOF: Any = grpc.aio.EOF  # pyright: ignore


class GrpcServer(TransportServer):
    """Streams at the server that answers Hello, which every router reaches.

    Beside them, if this worker exchanges rows in compiled steps, connections that carry rings.
    """

    def __init__(self, worker: ServedWorker) -> None:
        super().__init__(worker)
        self._rings: CarriedRings | None = None
        if worker.node is not None and not worker.is_encrypted:
            self._rings = CarriedRings(worker, worker.node)

    def start(self, host: str) -> None:
        if self._rings is not None:
            self._rings.start(host)

    def stop(self) -> None:
        if self._rings is not None:
            self._rings.stop()

    def endpoint_for(self, caller: pb.HelloRequest) -> str:
        """The offer of a ring, or nothing: the stream is opened on the channel of Hello."""
        offer = self._rings.offer() if self._rings is not None else None
        return offer.to_text() if offer is not None else ""

    def rpc_handlers(self) -> RpcHandlers:
        # Without serializers: messages are bytes here, and the codec reads them.
        return {"Exchange": grpc.stream_stream_rpc_method_handler(self._exchange)}

    async def _exchange(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await _Stream(self._worker, context).run()


class _Stream:
    """One router's stream: reads calls, submits them, and writes results as they come.

    Invariant: one task writes at a time; `_is_writing` says whether one does.
    """

    def __init__(self, worker: ServedWorker, context: Any) -> None:
        self._reactor = worker.reactor
        self._context = context
        self._max_calls_in_flight = worker.limits.max_calls_in_flight
        self._intake = Intake(worker.sessions, self._send)
        self._outbox: deque[bytes] = deque()
        self._is_writing = False
        self._is_taking = False
        self._has_room = asyncio.Event()

    async def run(self) -> None:
        """Runs until the stream breaks, or brings a malformed message."""
        context = self._context
        try:
            while (data := await context.read()) is not _EOF:
                self._take(data)
                if self._outbox and not self._is_writing:
                    await self._flush()
                while self._intake.num_open >= self._max_calls_in_flight:
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
        # The reading task itself writes what is answered at once, so that no task has to wake.
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
