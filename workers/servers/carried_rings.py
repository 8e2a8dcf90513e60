"""A worker's end of rings that TCP connections carry; see `wire.carried`.

Only who has a ticket may connect, and only Hello gives tickets. Nothing is offered while
connections between hosts are encrypted, because these are not.
"""

import asyncio
import logging
import secrets
import socket
from selectors import EVENT_READ

from milliways.runtime.hang_up import HangUp
from milliways.wire.addresses import plain_host
from milliways.wire.carried import (
    REQUEST_BYTES,
    TICKET_BYTES,
    VERSION,
    RingOffer,
    RingRequest,
)
from milliways.wire.exchange import ExchangeNode
from milliways.wire.tensors import MalformedMessageError
from milliways.workers.servers.transport import ServedWorker

logger = logging.getLogger(__name__)

_BACKLOG = 128
# Tickets that nobody has used yet, and connections; the oldest ticket goes first.
_MAX_TICKETS = 1024
_MAX_CONNECTIONS = 1024
_GREETING_TIMEOUT_S = 2.0


class CarriedRings:
    """Listens for routers of other hosts. Used in the thread of the worker's reactor.

    Invariant: `_rings` has the connections that the node serves, with their numbers there;
    `_num_greeting` counts those that have not shown a ticket yet.
    """

    def __init__(self, worker: ServedWorker, node: ExchangeNode) -> None:
        self._reactor = worker.reactor
        self._node = node
        self._max_bytes = worker.limits.max_shared_bytes
        self._tickets: dict[bytes, None] = {}
        self._rings: dict[HangUp, int] = {}
        self._num_greeting = 0
        self._listener: socket.socket | None = None

    def start(self, host: str) -> None:
        """Listens at any port of a host.

        Raises:
            OSError: that is not possible.
        """
        family = socket.AF_INET6 if ":" in plain_host(host) else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind((plain_host(host), 0))
        self._listener.listen(_BACKLOG)
        self._reactor.register(self._listener.fileno(), EVENT_READ, self._on_ready)
        self._reactor.add_closer(self.stop)

    def stop(self) -> None:
        """Accepts no more routers and breaks all connections."""
        if self._listener is None:
            return
        self._reactor.remove_closer(self.stop)
        self._reactor.unregister(self._listener.fileno())
        self._listener.close()
        self._listener = None
        for hang_up in list(self._rings):
            hang_up.close()
            self._forget(hang_up)

    def offer(self) -> RingOffer | None:
        """A ticket for one connection; None if this does not listen."""
        if self._listener is None:
            return None
        while len(self._tickets) >= _MAX_TICKETS:
            del self._tickets[next(iter(self._tickets))]
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = None
        return RingOffer(self._listener.getsockname()[1], ticket)

    def _on_ready(self, events: int) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # The router hung up already, or no file is left: no reason for the worker to fail.
            return
        if self._num_greeting + len(self._rings) >= _MAX_CONNECTIONS:
            connection.close()
            return
        self._num_greeting += 1
        self._reactor.run_in_loop(self._greet(connection))

    async def _greet(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(_GREETING_TIMEOUT_S):
                request = RingRequest.unpack(await _receive(connection, REQUEST_BYTES))
                self._check(request)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(connection, bytes([VERSION]))
            self._serve(connection, request)
        except (OSError, MalformedMessageError) as error:
            logger.info("no ring for a router: %s", error)
        finally:
            # Without effect once the node has the connection.
            connection.close()
            self._num_greeting -= 1

    def _check(self, request: RingRequest) -> None:
        if request.ticket not in self._tickets:
            raise MalformedMessageError("a ticket that is unknown, or was used")
        del self._tickets[request.ticket]
        if request.shape.num_bytes > self._max_bytes:
            raise MalformedMessageError(f"a ring of {request.shape.num_bytes} bytes")

    def _serve(self, connection: socket.socket, request: RingRequest) -> None:
        if self._listener is None:
            raise ConnectionAbortedError("this worker stops")
        hang_up = HangUp(self._reactor, lambda: self._forget(hang_up))
        try:
            fd = connection.detach()
            ring = self._node.attach_carried(fd, hang_up.write_fd, request.shape)
        except MalformedMessageError:
            hang_up.close()
            raise
        self._rings[hang_up] = ring

    def _forget(self, hang_up: HangUp) -> None:
        self._node.detach(self._rings.pop(hang_up))


async def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < num_bytes:
        data = await loop.sock_recv(connection, num_bytes - len(received))
        if not data:
            raise ConnectionResetError("it hung up before its request was whole")
        received += data
    return received
