"""A router's end of a ring that a TCP connection carries; see `wire.carried`."""

import asyncio
import socket
from collections.abc import Callable

from milliways.runtime.hang_up import HangUp
from milliways.runtime.reactor import Reactor
from milliways.wire.addresses import plain_host
from milliways.wire.carried import VERSION, RingOffer, RingRequest
from milliways.wire.exchange import ExchangeNode
from milliways.wire.tensors import MalformedMessageError

# A firewall that drops packets must not keep a link from opening for long.
_CONNECT_TIMEOUT_S = 1.0


class CarriedRing:
    """An open ring to one incarnation of a worker. Used in the reactor's thread."""

    def __init__(
        self,
        reactor: Reactor,
        node: ExchangeNode,
        connection: socket.socket,
        incarnation: int,
        on_lost: Callable[[], None],
    ) -> None:
        """Owns the connection; `on_lost` is called when it breaks, unless this is closed first.

        Raises:
            OSError, MalformedMessageError: no file or no memory is left.
        """
        self._node = node
        try:
            self._hang_up = HangUp(reactor, on_lost)
        except OSError:
            connection.close()
            raise
        fd = connection.detach()
        try:
            self.link = node.open_carried_link(fd, self._hang_up.write_fd, incarnation)
        except MalformedMessageError:
            self._hang_up.close()
            raise

    def close(self) -> None:
        """Calls in flight are lost."""
        self._hang_up.close()
        self._node.close_link(self.link)


async def connect_ring(address: str, offer: RingOffer, node: ExchangeNode) -> socket.socket:
    """Connects to a worker whose gRPC server is at `address`; in an event loop.

    Raises:
        OSError: it cannot be reached in time, or does not accept the ticket.
    """
    loop = asyncio.get_running_loop()
    host = plain_host(address.rpartition(":")[0])
    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
        found = await loop.getaddrinfo(host, offer.port, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(connection, where)
            await loop.sock_sendall(connection, RingRequest(offer.ticket, node.ring_shape).pack())
            answer = await loop.sock_recv(connection, 1)
            if answer != bytes([VERSION]):
                raise ConnectionRefusedError(f"the worker answered {answer!r}")
        except BaseException:
            connection.close()
            raise
    return connection
