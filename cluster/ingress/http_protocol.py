"""HTTP/1.1 as uvicorn speaks it, for clients that offer another protocol.

Java's client and `curl --http2` send `Upgrade: h2c` with their request. A server that does not know
the protocol ignores that, and answers over HTTP/1.1. uvicorn's parser stops at the offer instead,
and the body is lost. So the header gets another name before the parser sees it.
"""

import re
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_OFFER = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
_IGNORED = b"\r\nx-ignored-upgrade:"
_END_OF_HEADERS = b"\r\n\r\n"


class NoUpgradeProtocol(HttpToolsProtocol):
    """A connection on which no other protocol follows, not even WebSockets: we have none."""

    def data_received(self, data: bytes) -> None:
        # Within a body, the same bytes mean nothing.
        # uvicorn declares no None, which it is before the first request.
        cycle = cast(RequestResponseCycle | None, self.cycle)
        is_in_head = cycle is None or not cycle.more_body
        super().data_received(without_offers(data) if is_in_head else data)


def without_offers(data: bytes) -> bytes:
    """The data with another name for headers that offer a protocol."""
    head, end, body = data.partition(_END_OF_HEADERS)
    if not _OFFER.search(head):
        return data
    return _OFFER.sub(_IGNORED, head) + end + body
