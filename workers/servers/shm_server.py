"""A worker's shared memory: rings at an abstract Unix socket, payload in the routers' segments.

Runs in the compute thread's reactor, so a call goes from the doorbell into the core and its result
into the caller's memory without a change of threads. A router that sends nonsense loses its
connection; the worker goes on.
"""

import logging
import os
import secrets
import socket
import struct
from selectors import EVENT_READ
from typing import Any, NamedTuple

from milliways.runtime.reactor import Reactor
from milliways.wire import codec
from milliways.wire.calls import Refusal, Result
from milliways.wire.errors import RefusalReason
from milliways.wire.fields import Fields
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
from milliways.wire.shm import Segment, attach_segment
from milliways.wire.tensors import MalformedMessageError, PayloadReader
from milliways.workers.servers.intake import Intake, RouterSessions

logger = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
_BACKLOG = 128
_MAX_SEGMENTS = 64


class ShmServer:
    """Listens for routers of this host and user. Used from its reactor's thread."""

    def __init__(
        self,
        reactor: Reactor,
        sessions: RouterSessions,
        *,
        worker_id: str,
        incarnation: int,
        limits: LinkLimits | None = None,
    ) -> None:
        # Random: who knows it was told by the worker.
        self.socket_name = f"milliways-{worker_id}-{incarnation}-{secrets.token_hex(8)}"[:100]
        self._reactor = reactor
        self._sessions = sessions
        self._welcome = WelcomeFrame(PROTOCOL_VERSION, incarnation, worker_id)
        self._limits = limits or LinkLimits()
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()

    def start(self) -> None:
        """Listens."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{self.socket_name}")
        self._listener.listen(_BACKLOG)
        self._reactor.register(self._listener.fileno(), EVENT_READ, self._on_ready)
        self._reactor.add_closer(self.stop)

    def stop(self) -> None:
        """Takes nobody any more and breaks all connections."""
        if self._listener is None:
            return
        self._reactor.remove_closer(self.stop)
        self._reactor.unregister(self._listener.fileno())
        self._listener.close()
        self._listener = None
        for connection in tuple(self._connections):
            connection.close()

    def _on_ready(self, events: int) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            # It has hung up already, or there are no files left: not ours to die of.
            return
        if _peer_uid(accepted) != os.getuid():
            accepted.close()
            return
        connection = _Connection(
            self._reactor, accepted, self._sessions, self._welcome, self._limits
        )
        self._connections.add(connection)
        connection.when_closed = lambda: self._connections.discard(connection)


class _Connection:
    """One router: its segments, and where each of its open calls wants the response."""

    def __init__(
        self,
        reactor: Reactor,
        accepted: socket.socket,
        sessions: RouterSessions,
        welcome: WelcomeFrame,
        limits: LinkLimits,
    ) -> None:
        self.when_closed = _nothing
        self._welcome = welcome
        self._limits = limits
        self._intake = Intake(sessions, self._send)
        self._segments: dict[int, Segment] = {}
        self._rooms: dict[int, _Room] = {}
        self._is_greeted = False
        self._frames = FrameSocket(
            reactor,
            accepted,
            max_frame_bytes=limits.max_message_bytes,
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )

    def close(self) -> None:
        self._frames.close()
        self._on_lost("")

    def _on_lost(self, reason: str) -> None:
        self._intake.close()
        self._segments.clear()
        self._rooms.clear()
        self.when_closed()

    def _on_frame(self, kind: int, body: bytes) -> None:
        if not self._is_greeted:
            self._greet(kind, body)
        elif kind == FrameKind.CALL:
            self._take_call(CallFrame.unpack(body))
        elif kind == FrameKind.CALL_INLINE:
            fields = codec.split_request(body)
            payload = PayloadReader(body, fields.payload_start, fields.num_payload_bytes)
            self._submit(fields, payload, _NO_ROOM)
        elif kind == FrameKind.SEGMENT:
            self._attach(SegmentFrame.unpack(body))
        else:
            raise MalformedMessageError(f"a frame of kind {kind}")

    def _greet(self, kind: int, body: bytes) -> None:
        if kind != FrameKind.HELLO:
            raise MalformedMessageError("no greeting")
        hello = HelloFrame.unpack(body)
        # Said before the connection is closed, so that the other side knows why.
        self._frames.send(FrameKind.WELCOME, self._welcome.pack())
        if hello.version != PROTOCOL_VERSION:
            raise MalformedMessageError(f"protocol {hello.version}, not {PROTOCOL_VERSION}")
        self._is_greeted = True
        self._intake.greet(hello.router_id)

    def _attach(self, frame: SegmentFrame) -> None:
        if not self._frames.files:
            raise MalformedMessageError("a segment without its file")
        file = self._frames.files.popleft()
        try:
            shared_bytes = sum(segment.num_bytes for segment in self._segments.values())
            if (
                frame.segment_id in self._segments
                or len(self._segments) >= _MAX_SEGMENTS
                or shared_bytes + frame.num_bytes > self._limits.max_shared_bytes
            ):
                raise MalformedMessageError(f"a segment more: {frame}")
            self._segments[frame.segment_id] = attach_segment(file, frame.num_bytes)
        finally:
            os.close(file)

    def _take_call(self, frame: CallFrame) -> None:
        segment = self._segments.get(frame.segment_id)
        if segment is None:
            raise MalformedMessageError(f"segment {frame.segment_id} is not there")
        segment.check(frame.offset, frame.num_request_bytes)
        segment.check(frame.response_offset, frame.num_response_bytes)
        payload = PayloadReader(
            segment.buffer, frame.offset, frame.num_request_bytes, is_shared=True
        )
        room = _Room(segment.buffer, frame.response_offset, frame.num_response_bytes)
        self._submit(codec.split_request(frame.header), payload, room)

    def _submit(self, fields: Fields, payload: PayloadReader, room: "_Room") -> None:
        call_id = fields.call_id
        if call_id in self._rooms:
            raise MalformedMessageError(f"call {call_id} is open already")
        self._rooms[call_id] = room
        if len(self._rooms) > self._limits.max_calls_in_flight:
            text = f"more than {self._limits.max_calls_in_flight} calls"
            self._send(call_id, Refusal(RefusalReason.OVERLOADED, text))
            return
        self._intake.take(fields, payload)

    def _send(self, call_id: int, result: Result) -> None:
        room = self._rooms.pop(call_id)
        parts = codec.encode_response(call_id, result)
        num_bytes = parts.payload.num_bytes
        if num_bytes > room.num_bytes:
            self._frames.send(FrameKind.RESULT_INLINE, codec.join(parts))
            return
        parts.payload.write_to(room.buffer, room.offset)
        self._frames.send(FrameKind.RESULT, ResultFrame(num_bytes, parts.header).pack())


class _Room(NamedTuple):
    """Where a router wants a response's payload."""

    buffer: Any
    offset: int
    num_bytes: int


_NO_ROOM = _Room(b"", 0, 0)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1]


def _nothing() -> None:
    pass
