"""Frames over a Unix socket: the messages of the shared-memory transport.

A frame is a length (4 bytes, little-endian), a kind (1 byte) and as many bytes as the length says.
A worker and a router on one host exchange:

    router                          worker
    HELLO version, router_id   ->
                               <-   WELCOME version, incarnation, has exchange, worker_id
    BELL + file, RING shape, + file  ->              if both sides exchange rows natively
                               <-   BELL + file      (see wire/exchange.py)
    SEGMENT id, size, + file   ->
    CALL region, header        ->                     payload in the region
    CALL_INLINE message        ->                     payload in the message, as on gRPC
                               <-   RESULT size, header          payload in the call's region
                               <-   RESULT_INLINE message        payload too large for the region
"""

import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from selectors import EVENT_READ, EVENT_WRITE
from typing import NamedTuple

from milliways.runtime.reactor import Reactor
from milliways.wire.tensors import MalformedMessageError

PROTOCOL_VERSION = 2

_PREFIX = struct.Struct("<IB")
_RECEIVE_BYTES = 64 << 10
# Enough for four files.
_ANCILLARY_BYTES = socket.CMSG_LEN(4 * 4)

_HELLO = struct.Struct("<I")
_WELCOME = struct.Struct("<IQ?")
_SEGMENT = struct.Struct("<IQ")
_CALL = struct.Struct("<IQQQQ")
_RESULT = struct.Struct("<Q")
_RING = struct.Struct("<QQQ")


class FrameKind(IntEnum):
    """What a frame contains."""

    HELLO = 1
    WELCOME = 2
    SEGMENT = 3
    CALL = 4
    CALL_INLINE = 5
    RESULT = 6
    RESULT_INLINE = 7
    BELL = 8
    RING = 9


class HelloFrame(NamedTuple):
    version: int
    router_id: str

    def pack(self) -> bytes:
        return _HELLO.pack(self.version) + self.router_id.encode()

    @classmethod
    def unpack(cls, body: bytes) -> "HelloFrame":
        (version,), rest = _unpack(_HELLO, body)
        return cls(version, _text(rest))


class WelcomeFrame(NamedTuple):
    version: int
    incarnation: int
    has_exchange: bool
    worker_id: str

    def pack(self) -> bytes:
        return _WELCOME.pack(*self[:-1]) + self.worker_id.encode()

    @classmethod
    def unpack(cls, body: bytes) -> "WelcomeFrame":
        (version, incarnation, has_exchange), rest = _unpack(_WELCOME, body)
        return cls(version, incarnation, bool(has_exchange), _text(rest))


class RingFrame(NamedTuple):
    num_slots: int
    request_bytes: int
    response_bytes: int

    def pack(self) -> bytes:
        return _RING.pack(*self)

    @classmethod
    def unpack(cls, body: bytes) -> "RingFrame":
        return cls(*_unpack(_RING, body)[0])


class SegmentFrame(NamedTuple):
    segment_id: int
    num_bytes: int

    def pack(self) -> bytes:
        return _SEGMENT.pack(*self)

    @classmethod
    def unpack(cls, body: bytes) -> "SegmentFrame":
        return cls(*_unpack(_SEGMENT, body)[0])


class CallFrame(NamedTuple):
    segment_id: int
    offset: int
    num_request_bytes: int
    response_offset: int
    num_response_bytes: int
    header: bytes

    def pack(self) -> bytes:
        return _CALL.pack(*self[:-1]) + self.header

    @classmethod
    def unpack(cls, body: bytes) -> "CallFrame":
        (segment_id, offset, num_bytes, response_offset, response_bytes), header = _unpack(
            _CALL, body
        )
        return cls(segment_id, offset, num_bytes, response_offset, response_bytes, header)


class ResultFrame(NamedTuple):
    num_bytes: int
    header: bytes

    def pack(self) -> bytes:
        return _RESULT.pack(self.num_bytes) + self.header

    @classmethod
    def unpack(cls, body: bytes) -> "ResultFrame":
        (num_bytes,), header = _unpack(_RESULT, body)
        return cls(num_bytes, header)


class FrameSocket:
    """A connected Unix socket that sends and receives whole frames, in a reactor's thread.

    Invariant: `_unsent` has the frames, or the rest of one, that the socket did not take, in order;
    each file in it or in `files` is open and belongs to this object. The reactor watches for
    writing exactly while `_unsent` is not empty.
    """

    def __init__(
        self,
        reactor: Reactor,
        connection: socket.socket,
        *,
        max_frame_bytes: int,
        on_frame: Callable[[int, bytes], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """`on_frame` may raise MalformedMessageError; `on_lost` is called once, not after close."""
        connection.setblocking(False)
        self.files: deque[int] = deque()
        self._reactor = reactor
        self._socket = connection
        self._max_frame_bytes = max_frame_bytes
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._received = bytearray()
        self._unsent: deque[tuple[memoryview, int | None]] = deque()
        self._is_open = True
        self._waits_to_send = False
        reactor.register(connection.fileno(), EVENT_READ, self._on_ready)
        reactor.add_closer(self._on_reactor_stop)

    def send(self, kind: int, body: bytes, file: int | None = None) -> None:
        """Sends a frame, if the peer is slow later; owns the file from now on."""
        if not self._is_open:
            if file is not None:
                os.close(file)
            return
        frame = _PREFIX.pack(len(body), kind) + body
        if file is None and not self._unsent:
            frame = self._try_send(frame)
            if not frame:
                return
        self._unsent.append((memoryview(frame), file))
        if len(self._unsent) == 1:
            self._send_on()

    def _try_send(self, frame: bytes) -> bytes:
        """Sends at once; returns the rest of the frame, which is nearly always empty."""
        try:
            return frame[self._socket.send(frame) :]
        except OSError:
            # `_send_on` gets the same error and handles it.
            return frame

    def close(self) -> None:
        """Closes the socket and all files; `on_lost` is not called."""
        if not self._is_open:
            return
        self._is_open = False
        self._reactor.remove_closer(self._on_reactor_stop)
        self._reactor.unregister(self._socket.fileno())
        self._socket.close()
        files = [*self.files, *(file for _, file in self._unsent if file is not None)]
        self.files.clear()
        self._unsent.clear()
        for file in files:
            os.close(file)

    def _on_ready(self, events: int) -> None:
        if events & EVENT_READ:
            self._receive()
        if events & EVENT_WRITE and self._is_open:
            self._send_on()

    def _send_on(self) -> None:
        try:
            while self._unsent:
                frame, file = self._unsent[0]
                if file is None:
                    num_sent = self._socket.send(frame)
                else:
                    num_sent = socket.send_fds(self._socket, [frame], [file])
                    os.close(file)
                if num_sent < len(frame):
                    self._unsent[0] = (frame[num_sent:], None)
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(str(error))
            return
        if self._waits_to_send != bool(self._unsent):
            self._waits_to_send = bool(self._unsent)
            events = EVENT_READ | EVENT_WRITE if self._waits_to_send else EVENT_READ
            self._reactor.modify(self._socket.fileno(), events)

    def _receive(self) -> None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(str(error))
            return
        if ancillary:
            self.files.extend(_files_of(ancillary))
        if not data:
            self._lose("it closed the connection")
            return
        try:
            self._take(data)
        except MalformedMessageError as error:
            self._lose(f"it sent a malformed message: {error}")

    def _take(self, data: bytes) -> None:
        """Delivers the frames that are complete, and keeps the rest."""
        is_rest = bool(self._received)
        if is_rest:
            self._received += data
        unread = self._received if is_rest else data
        at, end = 0, len(unread)
        while self._is_open and end - at >= _PREFIX.size:
            length, kind = _PREFIX.unpack_from(unread, at)
            if length > self._max_frame_bytes:
                raise MalformedMessageError(f"a frame of {length} bytes")
            first = at + _PREFIX.size
            if end - first < length:
                break
            at = first + length
            self._on_frame(kind, bytes(unread[first:at]))
        if is_rest:
            del self._received[:at]
        elif at < end:
            self._received += data[at:]

    def _on_reactor_stop(self) -> None:
        self._lose("this side stops")

    def _lose(self, reason: str) -> None:
        if self._is_open:
            self.close()
            self._on_lost(reason)


def _files_of(ancillary: list[tuple[int, int, bytes]]) -> "array[int]":
    files = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(data[: len(data) // files.itemsize * files.itemsize])
    return files


def _unpack(form: struct.Struct, body: bytes) -> tuple[tuple[int, ...], bytes]:
    if len(body) < form.size:
        raise MalformedMessageError(f"a frame of only {len(body)} bytes")
    return form.unpack_from(body), body[form.size :]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessageError(str(error)) from error
