"""The input with which a link is opened: a worker that answered Hello, and the channel to it.

The class has a coroutine `open(opening, endpoint)`. It returns an open link, or raises
PeerLostError; then the router tries the next transport. `endpoint` is what the server of the same
transport returned for this router.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from milliways.runtime.reactor import Reactor
from milliways.v1 import worker_pb2 as pb
from milliways.wire.channels import open_channel
from milliways.wire.errors import PeerLostError
from milliways.wire.exchange import ExchangeNode
from milliways.wire.limits import LinkLimits
from milliways.wire.links import WorkerLink
from milliways.wire.tls import TlsSettings
from milliways.wire.view import Member

_SERVICE = "/milliways.v1.WorkerService"


class WorkerChannel:
    """A gRPC channel to a worker. It belongs to the event loop of the router's reactor."""

    def __init__(
        self, reactor: Reactor, member: Member, tls: TlsSettings, limits: LinkLimits
    ) -> None:
        self._reactor = reactor
        self._worker_id = member.worker_id
        self._timeout_s = limits.connect_timeout_s
        self._channel: Any = open_channel(member.address, tls, limits.grpc_options())

    async def hello(self, request: pb.HelloRequest) -> pb.HelloResponse:
        """Greets the worker; a coroutine of the router's tasks.

        Raises:
            PeerLostError: it cannot be reached, or does not answer in time.
        """
        try:
            return await self._reactor.run_in_loop(self._hello(request))
        except grpc.aio.AioRpcError as error:
            raise PeerLostError(self._worker_id, reason_of(error)) from error

    async def _hello(self, request: pb.HelloRequest) -> pb.HelloResponse:
        method = self._channel.unary_unary(
            f"{_SERVICE}/Hello",
            request_serializer=pb.HelloRequest.SerializeToString,
            response_deserializer=pb.HelloResponse.FromString,
        )
        return await method(request, timeout=self._timeout_s)

    def exchange(self) -> Any:
        """Opens an Exchange stream; messages are bytes."""
        return self._channel.stream_stream(f"{_SERVICE}/Exchange")()

    def close(self) -> None:
        """Closes the channel with its streams."""
        self._reactor.run_in_loop(self._channel.close())


@dataclass(slots=True)
class Opening:
    """Owns the channel until a link takes it."""

    reactor: Reactor
    hello: pb.HelloRequest
    member: Member
    limits: LinkLimits
    channel: WorkerChannel
    # The router's end of exchanges in compiled steps, if its shard computes such steps.
    node: ExchangeNode | None = None
    _is_taken: bool = field(default=False, init=False)

    def take_channel(self) -> WorkerChannel:
        """Gives the channel to a link, which has to close it."""
        assert not self._is_taken
        self._is_taken = True
        return self.channel

    def close(self) -> None:
        """Closes the channel, unless a link took it."""
        if not self._is_taken:
            self.channel.close()


class LinkClass(Protocol):
    """The class of a link, as the connector uses it."""

    async def open(self, opening: Opening, endpoint: str) -> WorkerLink:
        """Returns an open link; raises PeerLostError if it cannot be opened."""
        ...


def reason_of(error: Exception) -> str:
    """The reason why a gRPC call or stream broke."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
