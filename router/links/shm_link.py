"""A link to a worker on the same host: payload in shared memory, a Unix socket for the messages.

If both sides exchange rows in compiled steps, the link also opens a ring (`wire.exchange`).
"""

import os
import socket

from milliways.router.links.bounded_link import BoundedLink
from milliways.router.links.opening import Opening
from milliways.runtime.tasks import Pending
from milliways.wire import codec
from milliways.wire.calls import (
    AdvanceBatch,
    BeginBatch,
    Call,
    ExpertInput,
    Fence,
    Result,
    RunExperts,
)
from milliways.wire.errors import PeerLostError
from milliways.wire.exchange import ExchangeNode, bell_bytes
from milliways.wire.frames import (
    PROTOCOL_VERSION,
    CallFrame,
    FrameKind,
    FrameSocket,
    HelloFrame,
    ResultFrame,
    RingFrame,
    SegmentFrame,
    WelcomeFrame,
)
from milliways.wire.shm import Region, SharedMemory, check_file, make_file
from milliways.wire.tensors import ALIGNMENT, MalformedMessageError, PayloadReader

# Bytes for a row's expert ids in a response whose size is not known yet: 16 experts a token.
_ID_BYTES_PER_ROW = 64


class ShmLink(BoundedLink):
    """Writes each request into a region of shared memory, and reads the response there.

    The arrays of a result are in its region, which becomes free when they are deleted. A message
    travels in the socket if no shared memory is left for it.

    Invariant: each call in flight that has a region is in `_regions`, until its result is taken.
    """

    transport = "shm"

    @classmethod
    async def open(cls, opening: Opening, endpoint: str) -> "ShmLink":
        """Connects to the worker's socket and waits for its welcome; raises PeerLostError."""
        link = cls(opening, endpoint)
        is_open = False
        try:
            tasks, timeout_s = opening.reactor.tasks, opening.limits.connect_timeout_s
            if not await tasks.wait_for(link.opened, timeout_s):
                raise PeerLostError(opening.member.worker_id, f"no welcome within {timeout_s:g} s")
            link.opened.result()
            is_open = True
            return link
        finally:
            if not is_open:
                link.close()

    def __init__(self, opening: Opening, socket_name: str) -> None:
        """Raises PeerLostError if no server listens at the socket."""
        member, limits = opening.member, opening.limits
        super().__init__(member.worker_id, limits)
        self.opened = Pending[None]()
        self._welcome = WelcomeFrame(PROTOCOL_VERSION, member.incarnation, False, member.worker_id)
        self._node = opening.node
        # The file of a ring that the worker has not accepted yet.
        self._ring_fd: int | None = None
        self._regions: dict[int, Region] = {}
        self._memory = SharedMemory(limits.first_segment_bytes, limits.max_shared_bytes)
        # D as results have shown it, because BeginBatch at layer 0 does not say it.
        self._width = 0
        self._frames = FrameSocket(
            opening.reactor,
            _connected(member.worker_id, socket_name),
            max_frame_bytes=limits.max_message_bytes,
            on_frame=self._on_frame,
            on_lost=self._lose,
        )
        self._frames.send(
            FrameKind.HELLO, HelloFrame(PROTOCOL_VERSION, opening.hello.router_id).pack()
        )

    def _send(self, call_id: int, call: Call, fence: Fence) -> None:
        parts = codec.encode_request(call_id, call, fence)
        region = self._allocate(parts.payload.num_bytes, self._response_bytes(call))
        if region is None:
            self._frames.send(FrameKind.CALL_INLINE, codec.join(parts))
            return
        self._regions[call_id] = region
        self._memory.write_request(region, parts.payload)
        frame = CallFrame(
            region.segment_id,
            region.offset,
            region.num_request_bytes,
            region.response_offset,
            region.num_response_bytes,
            parts.header,
        )
        self._frames.send(FrameKind.CALL, frame.pack())

    def _allocate(self, num_request_bytes: int, num_response_bytes: int) -> Region | None:
        if not num_request_bytes:
            return None
        region = self._memory.try_allocate(num_request_bytes, num_response_bytes)
        if region is None:
            grown = self._memory.try_grow(num_request_bytes + num_response_bytes + ALIGNMENT)
            if grown is None:
                return None
            segment_id, num_bytes, file = grown
            frame = SegmentFrame(segment_id, num_bytes)
            self._frames.send(FrameKind.SEGMENT, frame.pack(), file)
            region = self._memory.try_allocate(num_request_bytes, num_response_bytes)
        return region

    def _response_bytes(self, call: Call) -> int:
        """Bytes to reserve for the payload of a call's result; too few only cost time."""
        match call:
            case RunExperts():
                # As if the worker had all the experts: counting would cost more than the memory.
                width, itemsize = call.rows_TD.shape[1], call.rows_TD.itemsize
                return call.expert_ids_TA.size * width * itemsize
            case BeginBatch():
                width = self._width if call.hidden_TD is None else call.hidden_TD.shape[1]
                num_rows = call.tokens.num_rows
            case AdvanceBatch():
                num_rows, _, width = call.outputs_TAD.shape
            case _:
                return 0
        # The residual stream is float32, and activations may be.
        return num_rows * (width * 4 + _ID_BYTES_PER_ROW) + ALIGNMENT

    def _on_frame(self, kind: int, body: bytes) -> None:
        if kind == FrameKind.WELCOME:
            self._check(WelcomeFrame.unpack(body))
        elif kind == FrameKind.RESULT:
            self._take_result(ResultFrame.unpack(body))
        elif kind == FrameKind.RESULT_INLINE:
            self._take_inline(body)
        elif kind == FrameKind.BELL:
            self._open_ring()
        else:
            raise MalformedMessageError(f"a frame of unexpected kind {kind}")

    def _check(self, welcome: WelcomeFrame) -> None:
        if welcome._replace(has_exchange=False) != self._welcome:
            raise MalformedMessageError(f"{welcome}, not {self._welcome}")
        if not welcome.has_exchange or self._node is None:
            self.opened.resolve(None)
            return
        try:
            self._offer_ring(self._node)
        except OSError as error:
            # No descriptor or memory is left: the next transport needs less of them.
            self._lose(f"no ring can be made: {error}")

    def _offer_ring(self, node: ExchangeNode) -> None:
        shape = node.ring_shape
        self._ring_fd = make_file(shape.num_bytes)
        self._frames.send(FrameKind.BELL, b"", os.dup(node.bell_fd))
        frame = RingFrame(shape.num_slots, shape.request_bytes, shape.response_bytes)
        self._frames.send(FrameKind.RING, frame.pack(), os.dup(self._ring_fd))

    def _open_ring(self) -> None:
        """The worker has accepted the ring, and sends its bell."""
        ring_fd, self._ring_fd = self._ring_fd, None
        if ring_fd is None or self._node is None:
            raise MalformedMessageError("a bell for no ring")
        try:
            if not self._frames.files:
                raise MalformedMessageError("a bell without its file")
            bell_fd = self._frames.files.popleft()
            try:
                check_file(bell_fd, bell_bytes())
                incarnation = self._welcome.incarnation
                self.exchange_link = self._node.open_link(ring_fd, bell_fd, incarnation)
            finally:
                os.close(bell_fd)
        finally:
            os.close(ring_fd)
        self.opened.resolve(None)

    def _take_result(self, frame: ResultFrame) -> None:
        fields = codec.split_response(frame.header)
        region = self._regions.pop(fields.call_id, None)
        limit = region.num_response_bytes if region else 0
        if frame.num_bytes > limit:
            text = f"a result of {frame.num_bytes} bytes in a region for {limit}"
            raise MalformedMessageError(text)
        data = b"" if region is None else self._memory.response(region, frame.num_bytes)
        reader = PayloadReader(data, 0, frame.num_bytes)
        self._take(fields.call_id, codec.decode_response(fields, reader))

    def _take_inline(self, body: bytes) -> None:
        fields = codec.split_response(body)
        region = self._regions.pop(fields.call_id, None)
        if region is not None:
            self._memory.free(region)
        reader = PayloadReader(body, fields.payload_start, fields.num_payload_bytes)
        self._take(fields.call_id, codec.decode_response(fields, reader))

    def _take(self, call_id: int, result: Result) -> None:
        if isinstance(result, ExpertInput):
            self._width = result.rows_TD.shape[1]
        self._settle(call_id, result)

    def _release(self, reason: str) -> None:
        self._frames.close()
        self._regions.clear()
        self._memory.close()
        if self._ring_fd is not None:
            os.close(self._ring_fd)
            self._ring_fd = None
        if self._node is not None and self.exchange_link:
            self._node.close_link(self.exchange_link)
        self.opened.fail(PeerLostError(self._worker_id, reason))


def _connected(worker_id: str, socket_name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Not blocking: a full backlog counts as lost too, because waiting would stop the router.
    connection.setblocking(False)
    try:
        connection.connect(f"\0{socket_name}")
    except OSError as error:
        connection.close()
        raise PeerLostError(worker_id, str(error)) from error
    return connection
