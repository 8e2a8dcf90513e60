"""The server of shared memory: a Unix socket for the messages, payload in the routers' segments.

It runs in the compute thread's reactor: a call goes from the socket into the core, and its result
into the caller's memory, without a change of threads.
"""

import os
import secrets
import socket
import struct
from selectors import EVENT_READ
from typing import Any, NamedTuple

from milliways.v1 import worker_pb2 as pb
from milliways.wire import codec
from milliways.wire.calls import Refusal, Result
from milliways.wire.errors import RefusalReason
from milliways.wire.exchange import RingShape, bell_bytes
from milliways.wire.fields import Fields
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
from milliways.wire.shm import Segment, attach_segment, check_file, local_host_id
from milliways.wire.tensors import MalformedMessageError, PayloadReader
from milliways.workers.servers.intake import Intake
from milliways.workers.servers.transport import ServedWorker, TransportServer

_CREDENTIALS = struct.Struct("3i")
_BACKLOG = 128
_MAX_SEGMENTS = 64


class ShmServer(TransportServer):
    """Listens for routers of this host and user.

    Invariant: `_connections` has exactly the connections that are open.
    """

    def __init__(self, worker: ServedWorker) -> None:
        super().__init__(worker)
        # Random, so that only those know it to whom the worker said it.
        name = f"milliways-{worker.worker_id}-{worker.incarnation}-{secrets.token_hex(8)}"
        self.socket_name = name[:100]
        self._host_id = local_host_id()
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()

    def start(self, host: str) -> None:
        """Listens at an abstract Unix socket."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{self.socket_name}")
        self._listener.listen(_BACKLOG)
        reactor = self._worker.reactor
        reactor.register(self._listener.fileno(), EVENT_READ, self._on_ready)
        reactor.add_closer(self.stop)

    def stop(self) -> None:
        """Accepts no more routers and breaks all connections."""
        if self._listener is None:
            return
        reactor = self._worker.reactor
        reactor.remove_closer(self.stop)
        reactor.unregister(self._listener.fileno())
        self._listener.close()
        self._listener = None
        for connection in tuple(self._connections):
            connection.close()

    def endpoint_for(self, caller: pb.HelloRequest) -> str | None:
        """The socket's name, for callers that can share memory with this process."""
        can_share = self._host_id and caller.host_id == self._host_id
        return self.socket_name if can_share else None

    def _on_ready(self, events: int) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            # The router hung up already, or no file is left: no reason for the worker to fail.
            return
        if _peer_uid(accepted) != os.getuid():
            accepted.close()
            return
        connection = _Connection(self._worker, accepted)
        self._connections.add(connection)
        connection.when_closed = lambda: self._connections.discard(connection)


class _Connection:
    """One router: its segments, and for each of its open calls where the response goes.

    Invariant: `_targets` has exactly the calls that were taken and not answered, while it is open.
    """

    def __init__(self, worker: ServedWorker, accepted: socket.socket) -> None:
        self.when_closed = _nothing
        self._node = worker.node
        self._welcome = WelcomeFrame(
            PROTOCOL_VERSION, worker.incarnation, worker.node is not None, worker.worker_id
        )
        # The router's ring, once it is served, and the router's bell before that.
        self._ring = 0
        self._bell_fd: int | None = None
        self._limits = worker.limits
        self._intake = Intake(worker.sessions, self._send)
        self._segments: dict[int, Segment] = {}
        self._targets: dict[int, _Target] = {}
        self._is_greeted = False
        self._frames = FrameSocket(
            worker.reactor,
            accepted,
            max_frame_bytes=worker.limits.max_message_bytes,
            on_frame=self._on_frame,
            on_lost=self._on_lost,
        )

    def close(self) -> None:
        self._frames.close()
        self._on_lost("")

    def _on_lost(self, reason: str) -> None:
        self._intake.close()
        self._segments.clear()
        self._targets.clear()
        self._close_bell()
        if self._node is not None and self._ring:
            self._node.detach(self._ring)
            self._ring = 0
        self.when_closed()

    def _on_frame(self, kind: int, body: bytes) -> None:
        if not self._is_greeted:
            self._greet(kind, body)
        elif kind == FrameKind.CALL:
            self._take_call(CallFrame.unpack(body))
        elif kind == FrameKind.CALL_INLINE:
            fields = codec.split_request(body)
            payload = PayloadReader(body, fields.payload_start, fields.num_payload_bytes)
            self._submit(fields, payload, _NO_TARGET)
        elif kind == FrameKind.SEGMENT:
            self._attach(SegmentFrame.unpack(body))
        elif kind == FrameKind.BELL:
            self._close_bell()
            self._bell_fd = self._take_file()
            check_file(self._bell_fd, bell_bytes())
        elif kind == FrameKind.RING:
            self._serve_ring(RingFrame.unpack(body))
        else:
            raise MalformedMessageError(f"a frame of unexpected kind {kind}")

    def _greet(self, kind: int, body: bytes) -> None:
        if kind != FrameKind.HELLO:
            raise MalformedMessageError("the first frame is no HELLO")
        hello = HelloFrame.unpack(body)
        # Sent even if the connection is closed next, so that the router can see why.
        self._frames.send(FrameKind.WELCOME, self._welcome.pack())
        if hello.version != PROTOCOL_VERSION:
            raise MalformedMessageError(f"protocol {hello.version}, not {PROTOCOL_VERSION}")
        self._is_greeted = True
        self._intake.greet(hello.router_id)

    def _attach(self, frame: SegmentFrame) -> None:
        file = self._take_file()
        try:
            shared_bytes = sum(segment.num_bytes for segment in self._segments.values())
            if (
                frame.segment_id in self._segments
                or len(self._segments) >= _MAX_SEGMENTS
                or shared_bytes + frame.num_bytes > self._limits.max_shared_bytes
            ):
                raise MalformedMessageError(f"one segment too many, or twice the same: {frame}")
            self._segments[frame.segment_id] = attach_segment(file, frame.num_bytes)
        finally:
            os.close(file)

    def _take_file(self) -> int:
        if not self._frames.files:
            raise MalformedMessageError("a frame without its file")
        return self._frames.files.popleft()

    def _close_bell(self) -> None:
        if self._bell_fd is not None:
            os.close(self._bell_fd)
            self._bell_fd = None

    def _serve_ring(self, frame: RingFrame) -> None:
        """Serves the router's ring, and sends the bell of this worker."""
        file = self._take_file()
        try:
            if self._node is None or self._bell_fd is None or self._ring:
                raise MalformedMessageError("a ring without a bell, or a second one")
            shape = RingShape(
                num_slots=frame.num_slots,
                request_bytes=frame.request_bytes,
                response_bytes=frame.response_bytes,
            )
            check_file(file, shape.num_bytes)
            if shape.num_bytes > self._limits.max_shared_bytes:
                raise MalformedMessageError(f"a ring of {shape.num_bytes} bytes")
            self._ring = self._node.attach(file, self._bell_fd, shape)
            self._close_bell()
            self._frames.send(FrameKind.BELL, b"", os.dup(self._node.bell_fd))
        except OSError as error:
            raise MalformedMessageError(f"a ring, and no descriptor is left: {error}") from error
        finally:
            os.close(file)

    def _take_call(self, frame: CallFrame) -> None:
        segment = self._segments.get(frame.segment_id)
        if segment is None:
            raise MalformedMessageError(f"there is no segment {frame.segment_id}")
        segment.check(frame.offset, frame.num_request_bytes)
        segment.check(frame.response_offset, frame.num_response_bytes)
        payload = PayloadReader(
            segment.buffer, frame.offset, frame.num_request_bytes, is_shared=True
        )
        target = _Target(segment.buffer, frame.response_offset, frame.num_response_bytes)
        self._submit(codec.split_request(frame.header), payload, target)

    def _submit(self, fields: Fields, payload: PayloadReader, target: "_Target") -> None:
        call_id = fields.call_id
        if call_id in self._targets:
            raise MalformedMessageError(f"call {call_id} is in flight already")
        self._targets[call_id] = target
        if len(self._targets) > self._limits.max_calls_in_flight:
            text = f"more than {self._limits.max_calls_in_flight} calls in flight"
            self._send(call_id, Refusal(RefusalReason.OVERLOADED, text))
            return
        self._intake.take(fields, payload)

    def _send(self, call_id: int, result: Result) -> None:
        target = self._targets.pop(call_id)
        parts = codec.encode_response(call_id, result)
        num_bytes = parts.payload.num_bytes
        if num_bytes > target.num_bytes:
            self._frames.send(FrameKind.RESULT_INLINE, codec.join(parts))
            return
        parts.payload.write_to(target.buffer, target.offset)
        self._frames.send(FrameKind.RESULT, ResultFrame(num_bytes, parts.header).pack())


class _Target(NamedTuple):
    """Where a router wants a response's payload."""

    buffer: Any
    offset: int
    num_bytes: int


_NO_TARGET = _Target(b"", 0, 0)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1]


def _nothing() -> None:
    pass
