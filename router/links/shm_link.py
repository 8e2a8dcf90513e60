"""A router's way to a worker on its host: payload in memory they share, a socket as doorbell."""

import socket
from collections import deque

from milliways.router.links.calls_out import CallsOut
from milliways.runtime.reactor import Reactor
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
from milliways.wire.frames import (
    PROTOCOL_VERSION,
    CallFrame,
    FrameKind,
    FrameSocket,
    HelloFrame,
    ResultFrame,
    SegmentFrame,
    WelcomeFrame,
)
from milliways.wire.limits import LinkLimits
from milliways.wire.shm import Region, SharedMemory
from milliways.wire.tensors import ALIGNMENT, MalformedMessageError, PayloadReader

# Bytes of a row's expert ids in a response that is not known yet: 16 experts for each token.
_ID_BYTES_PER_ROW = 64


class ShmLink:
    """Allocates a region for each call, writes the request there, and reads the response there.

    Arrays of a result lie in the region, which is free again when they are gone. What does not fit
    into the memory that may be shared travels in the socket instead.
    """

    def __init__(
        self,
        reactor: Reactor,
        worker_id: str,
        incarnation: int,
        *,
        socket_name: str,
        router_id: str,
        limits: LinkLimits,
    ) -> None:
        """Raises PeerLostError where nobody listens any more."""
        self.opened = Pending[None]()
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._max_calls_in_flight = limits.max_calls_in_flight
        self._out = CallsOut(worker_id)
        self._regions: dict[int, Region] = {}
        self._memory = SharedMemory(limits.first_segment_bytes, limits.max_shared_bytes)
        self._waiting: deque[tuple[Call, Fence, Pending[Result]]] = deque()
        # D, as far as results have shown it: what BeginBatch at layer 0 does not say.
        self._width = 0
        self._frames = FrameSocket(
            reactor,
            _connected(worker_id, socket_name),
            max_frame_bytes=limits.max_message_bytes,
            on_frame=self._on_frame,
            on_lost=self._lose,
        )
        self._frames.send(FrameKind.HELLO, HelloFrame(PROTOCOL_VERSION, router_id).pack())

    @property
    def transport(self) -> str:
        return "shm"

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
        """Breaks the connection. Arrays of results stay what they are."""
        self._frames.close()
        self._lose("closed")

    def _send(self, call: Call, fence: Fence, pending: Pending[Result]) -> None:
        call_id = self._out.add(pending)
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
        """The most that the payload of a call's result takes; too little only costs time."""
        match call:
            case RunExperts():
                # As if all its experts were at this worker: counting costs more than the room.
                width, itemsize = call.rows_TD.shape[1], call.rows_TD.itemsize
                return call.expert_ids_TA.size * width * itemsize
            case BeginBatch():
                width = self._width if call.hidden_TD is None else call.hidden_TD.shape[1]
                num_rows = call.tokens.num_rows
            case AdvanceBatch():
                num_rows, _, width = call.outputs_TAD.shape
            case _:
                return 0
        # Float32, as a residual stream is and activations may be.
        return num_rows * (width * 4 + _ID_BYTES_PER_ROW) + ALIGNMENT

    def _on_frame(self, kind: int, body: bytes) -> None:
        if kind == FrameKind.WELCOME:
            self._check(WelcomeFrame.unpack(body))
        elif kind == FrameKind.RESULT:
            self._take_result(ResultFrame.unpack(body))
        elif kind == FrameKind.RESULT_INLINE:
            self._take_inline(body)
        else:
            raise MalformedMessageError(f"a frame of kind {kind}")

    def _check(self, welcome: WelcomeFrame) -> None:
        expected = WelcomeFrame(PROTOCOL_VERSION, self._incarnation, self._worker_id)
        if welcome != expected:
            raise MalformedMessageError(f"{welcome}, not {expected}")
        self.opened.resolve(None)

    def _take_result(self, frame: ResultFrame) -> None:
        fields = codec.split_response(frame.header)
        region = self._regions.pop(fields.call_id, None)
        limit = region.num_response_bytes if region else 0
        if frame.num_bytes > limit:
            raise MalformedMessageError(f"a result of {frame.num_bytes} bytes in room for {limit}")
        data = b"" if region is None else self._memory.response(region, frame.num_bytes)
        reader = PayloadReader(data, 0, frame.num_bytes)
        self._settle(fields.call_id, codec.decode_response(fields, reader))

    def _take_inline(self, body: bytes) -> None:
        fields = codec.split_response(body)
        region = self._regions.pop(fields.call_id, None)
        if region is not None:
            self._memory.free(region)
        reader = PayloadReader(body, fields.payload_start, fields.num_payload_bytes)
        self._settle(fields.call_id, codec.decode_response(fields, reader))

    def _settle(self, call_id: int, result: Result) -> None:
        if isinstance(result, ExpertInput):
            self._width = result.rows_TD.shape[1]
        self._out.settle(call_id, result)
        while self._waiting and len(self._out) < self._max_calls_in_flight:
            self._send(*self._waiting.popleft())

    def _lose(self, reason: str) -> None:
        self._out.lose(reason)
        self._regions.clear()
        self._memory.close()
        self.opened.fail(PeerLostError(self._worker_id, reason))
        waiting, self._waiting = self._waiting, deque()
        for _, _, pending in waiting:
            self._out.fail(pending)


def _connected(worker_id: str, socket_name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A full backlog counts as gone too: waiting would stop the router.
    connection.setblocking(False)
    try:
        connection.connect(f"\0{socket_name}")
    except OSError as error:
        connection.close()
        raise PeerLostError(worker_id, str(error)) from error
    return connection
