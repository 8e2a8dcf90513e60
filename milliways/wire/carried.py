"""How a router asks a worker on another host for a connection that carries their ring.

The rows of compiled steps travel over a TCP connection of their own, beside the gRPC stream that
has all other calls; see `model/ops/native/carrier.h`. Hello returns an offer: a port and a
ticket for one connection. The router connects and sends the ticket with the shape of its ring:

    router                                 worker
    REQUEST version, ticket, shape   ->
                                     <-   VERSION, one byte

Afterwards native threads of both sides read and write the connection.
"""

import struct
from typing import NamedTuple

from milliways.wire.exchange import RingShape
from milliways.wire.tensors import MalformedMessageError

VERSION = 1
TICKET_BYTES = 16
_REQUEST = struct.Struct(f"<B{TICKET_BYTES}sQQQ")
REQUEST_BYTES = _REQUEST.size


class RingOffer(NamedTuple):
    """Where a worker takes the connection, and the ticket that it wants to see."""

    port: int
    ticket: bytes

    def to_text(self) -> str:
        """`port/ticket`, for the endpoints of Hello."""
        return f"{self.port}/{self.ticket.hex()}"

    @classmethod
    def from_text(cls, text: str) -> "RingOffer":
        """Raises MalformedMessageError unless `to_text` could have made it."""
        port, _, ticket = text.partition("/")
        try:
            offer = cls(int(port), bytes.fromhex(ticket))
        except ValueError as error:
            raise MalformedMessageError(f"an offer of a ring: {text!r}") from error
        if not 0 < offer.port < 1 << 16 or len(offer.ticket) != TICKET_BYTES:
            raise MalformedMessageError(f"an offer of a ring: {text!r}")
        return offer


class RingRequest(NamedTuple):
    """What the router sends first."""

    ticket: bytes
    shape: RingShape

    def pack(self) -> bytes:
        shape = self.shape
        sizes = (shape.num_slots, shape.request_bytes, shape.response_bytes)
        return _REQUEST.pack(VERSION, self.ticket, *sizes)

    @classmethod
    def unpack(cls, data: bytes) -> "RingRequest":
        """Raises MalformedMessageError if it is of another version or length."""
        if len(data) != REQUEST_BYTES or data[0] != VERSION:
            raise MalformedMessageError("a request for a ring, of another version")
        _, ticket, num_slots, request_bytes, response_bytes = _REQUEST.unpack(data)
        most = (1 << 63) - 1
        if max(num_slots, request_bytes, response_bytes) > most:
            raise MalformedMessageError("a request for a ring, of impossible sizes")
        shape = RingShape(
            num_slots=num_slots, request_bytes=request_bytes, response_bytes=response_bytes
        )
        return cls(ticket, shape)
