"""A router's gRPC: a channel to one worker, its Hello, and the Exchange stream as a link."""

import asyncio
from collections import deque
from typing import Any

import grpc

from milliways.router.links.calls_out import CallsOut
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.v1 import worker_pb2 as pb
from milliways.wire import codec
from milliways.wire.calls import Call, Fence, Result
from milliways.wire.channels import open_channel
from milliways.wire.errors import PeerLostError
from milliways.wire.limits import LinkLimits
from milliways.wire.tensors import MalformedMessageError, PayloadReader
from milliways.wire.tls import TlsSettings

_EOF: Any = grpc.aio.EOF  # pyright: ignore
_SERVICE = "/milliways.v1.WorkerService"


class GrpcChannel:
    """A channel to a worker. Lives in the loop that the router's reactor hosts."""

    def __init__(
        self,
        reactor: Reactor,
        worker_id: str,
        address: str,
        *,
        tls: TlsSettings,
        limits: LinkLimits,
    ) -> None:
        self._reactor = reactor
        self._worker_id = worker_id
        self._limits = limits
        self._channel: Any = open_channel(address, tls, limits.grpc_options())

    async def hello(self, request: pb.HelloRequest) -> pb.HelloResponse:
        """Greets the worker; a coroutine of the router's tasks.

        Raises:
            PeerLostError: it cannot be reached, or does not answer in time.
        """
        try:
            return await self._reactor.run_in_loop(self._hello(request))
        except grpc.aio.AioRpcError as error:
            raise PeerLostError(self._worker_id, _reason(error)) from error

    async def _hello(self, request: pb.HelloRequest) -> pb.HelloResponse:
        method = self._channel.unary_unary(
            f"{_SERVICE}/Hello",
            request_serializer=pb.HelloRequest.SerializeToString,
            response_deserializer=pb.HelloResponse.FromString,
        )
        return await method(request, timeout=self._limits.connect_timeout_s)

    def exchange(self) -> "GrpcLink":
        """Opens the stream; the link closes the channel when it is closed."""
        stream = self._channel.stream_stream(f"{_SERVICE}/Exchange")()
        return GrpcLink(self._reactor, self._worker_id, self, stream, self._limits)

    def close(self) -> None:
        """Closes the channel with all that goes through it."""
        self._reactor.run_in_loop(self._channel.close())


class GrpcLink:
    """An Exchange stream. Sends in the order of asking; results come in any."""

    def __init__(
        self, reactor: Reactor, worker_id: str, door: GrpcChannel, stream: Any, limits: LinkLimits
    ) -> None:
        self._reactor = reactor
        self._door = door
        self._stream = stream
        self._max_calls_in_flight = limits.max_calls_in_flight
        self._out = CallsOut(worker_id)
        self._waiting: deque[tuple[Call, Fence, Pending[Result]]] = deque()
        self._outbox: deque[bytes] = deque()
        self._is_writing = False
        self._is_closed = False
        assert reactor.loop is not None
        self._loop = reactor.loop
        # Kept, as event loops hold their tasks weakly.
        self._writer: Any = None
        self._reader = self._loop.create_task(self._read())
        reactor.add_closer(self.close)

    @property
    def transport(self) -> str:
        return "grpc"

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        """Sends a call, or queues it where as many as may be are out."""
        pending = Pending[Result]()
        if self._out.is_lost:
            self._out.fail(pending)
        elif len(self._out) >= self._max_calls_in_flight:
            self._waiting.append((call, fence, pending))
        else:
            self._send(call, fence, pending)
        return pending

    def close(self) -> None:
        """Breaks the stream and closes the channel."""
        self._lose("closed")

    def _send(self, call: Call, fence: Fence, pending: Pending[Result]) -> None:
        call_id = self._out.add(pending)
        self._outbox.append(codec.join(codec.encode_request(call_id, call, fence)))
        if not self._is_writing:
            self._is_writing = True
            self._writer = self._loop.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._outbox:
                await self._stream.write(self._outbox.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            # The reader knows as well, but maybe not yet.
            self._lose(_reason(error))
        finally:
            self._is_writing = False

    async def _read(self) -> None:
        try:
            while (data := await self._stream.read()) is not _EOF:
                self._settle(data)
                # Whoever waited may ask again at once. It is not written here: a reader that waits
                # for its peer to read is waited for by a peer that does the same.
                self._reactor.run_due()
            self._lose("it ended the stream")
        except grpc.aio.AioRpcError as error:
            self._lose(_reason(error))
        except MalformedMessageError as error:
            self._lose(f"it sent what is no message: {error}")
        finally:
            self._lose("the stream broke")

    def _settle(self, data: bytes) -> None:
        fields = codec.split_response(data)
        payload = PayloadReader(data, fields.payload_start, fields.num_payload_bytes)
        self._out.settle(fields.call_id, codec.decode_response(fields, payload))
        while self._waiting and len(self._out) < self._max_calls_in_flight:
            self._send(*self._waiting.popleft())

    def _lose(self, message: str) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._reactor.remove_closer(self.close)
        self._out.lose(message)
        self._outbox.clear()
        waiting, self._waiting = self._waiting, deque()
        for _, _, pending in waiting:
            self._out.fail(pending)
        self._stream.cancel()
        self._door.close()


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
