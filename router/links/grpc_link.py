"""A link over gRPC: an Exchange stream of the channel that carried Hello.

If both sides exchange rows in compiled steps, the link also opens a ring; the rows travel over a
TCP connection beside the stream (`wire.carried`).
"""

import asyncio
import logging
from collections import deque
from functools import partial
from typing import Any

import grpc

from milliways.router.links.bounded_link import BoundedLink
from milliways.router.links.carried_ring import CarriedRing, connect_ring
from milliways.router.links.opening import Opening, reason_of
from milliways.runtime.tasks import Task
from milliways.wire import codec
from milliways.wire.calls import Call, Fence
from milliways.wire.carried import RingOffer
from milliways.wire.errors import PeerLostError
from milliways.wire.exchange import ExchangeNode
from milliways.wire.tensors import MalformedMessageError, PayloadReader

logger = logging.getLogger(__name__)

# The wait before the next attempt to open a ring; it doubles each time.
_TRY_AGAIN_AFTER_S = 0.5
_TRY_AGAIN_AFTER_S_MAX = 30.0

_EOF: Any = grpc.aio.EOF  # pyright: ignore


class GrpcLink(BoundedLink):
    """Owns the stream and its channel. Reads and writes in two tasks of the reactor's event loop.

    Invariant: at most one task writes; while `_outbox` holds something, it runs.
    """

    transport = "grpc"

    @classmethod
    async def open(cls, opening: Opening, endpoint: str) -> "GrpcLink":
        """Takes over the channel; a stream that cannot be opened breaks at once."""
        link = cls(opening)
        if opening.node is not None and endpoint:
            await link._open_ring(opening, opening.node, endpoint)
            if link._ring is None:
                link._trying = link._reactor.tasks.start(link._try_again(opening, opening.node))
        return link

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening.member.worker_id, opening.limits)
        reactor = opening.reactor
        assert reactor.loop is not None
        self._reactor = reactor
        self._loop = reactor.loop
        self._channel = opening.take_channel()
        self._stream = self._channel.exchange()
        self._outbox: deque[bytes] = deque()
        self._is_writing = False
        # Both are kept here, because event loops refer to their tasks weakly.
        self._writer: Any = None
        self._reader = self._loop.create_task(self._read())
        self._ring: CarriedRing | None = None
        self._trying: Task[None] | None = None
        reactor.add_closer(self.close)

    async def _open_ring(self, opening: Opening, node: ExchangeNode, endpoint: str) -> None:
        """Connects once; without a ring, all rows go by the stream."""
        member = opening.member
        lost = partial(self._lose, "the connection of its ring broke")
        try:
            offer = RingOffer.from_text(endpoint)
            connection = await self._reactor.run_in_loop(connect_ring(member.address, offer, node))
            if self._loss is not None:
                connection.close()
                return
            self._ring = CarriedRing(self._reactor, node, connection, member.incarnation, lost)
        except (OSError, MalformedMessageError) as error:
            logger.warning("no ring to %s, only a stream: %r", member.worker_id, error)
            return
        self.exchange_link = self._ring.link

    async def _try_again(self, opening: Opening, node: ExchangeNode) -> None:
        """Asks for another ticket and connects, until there is a ring or the link is lost."""
        wait_s = _TRY_AGAIN_AFTER_S
        while self._ring is None and self._loss is None:
            await self._reactor.tasks.sleep(wait_s)
            wait_s = min(2 * wait_s, _TRY_AGAIN_AFTER_S_MAX)
            try:
                response = await self._channel.hello(opening.hello)
            except PeerLostError as error:
                logger.info("%s", error)
                continue
            # A worker of another incarnation breaks the stream; its rings are not for this link.
            if response.incarnation == opening.member.incarnation:
                await self._open_ring(opening, node, response.endpoints.get("grpc", ""))

    def _send(self, call_id: int, call: Call, fence: Fence) -> None:
        self._outbox.append(codec.join(codec.encode_request(call_id, call, fence)))
        if not self._is_writing:
            self._is_writing = True
            self._writer = self._loop.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._outbox:
                await self._stream.write(self._outbox.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            # The reader sees the break too, perhaps later.
            self._lose(reason_of(error))
        finally:
            self._is_writing = False

    async def _read(self) -> None:
        try:
            while (data := await self._stream.read()) is not _EOF:
                self._take(data)
                # Tasks that waited for this result run now and may ask again. The writer sends it:
                # if this reader waited for its peer to read, and the peer did the same, both would
                # wait for ever.
                self._reactor.run_due()
            self._lose("it ended the stream")
        except grpc.aio.AioRpcError as error:
            self._lose(reason_of(error))
        except MalformedMessageError as error:
            self._lose(f"it sent a malformed message: {error}")
        finally:
            self._lose("the stream broke")

    def _take(self, data: bytes) -> None:
        fields = codec.split_response(data)
        payload = PayloadReader(data, fields.payload_start, fields.num_payload_bytes)
        self._settle(fields.call_id, codec.decode_response(fields, payload))

    def _release(self, reason: str) -> None:
        self._reactor.remove_closer(self.close)
        self._outbox.clear()
        if self._trying is not None:
            self._trying.cancel()
        if self._ring is not None:
            self._ring.close()
        self._stream.cancel()
        self._channel.close()
