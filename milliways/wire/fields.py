"""Splits and builds the top level of a protobuf message by hand.

Protobuf's own parser would copy a payload three times. It also cannot return the bytes of a nested
message, by which the codec recognises messages that it decoded before.
"""

from typing import NamedTuple

from google.protobuf.message import Message

from milliways.wire.tensors import MalformedMessageError

VARINT = 0
LENGTH_DELIMITED = 2
# Wire types 1 and 5.
_FIXED_BYTES = {1: 8, 5: 4}

# Numbers of the fields that requests and responses share.
CALL_ID = 1
FENCE = 2
PADDING = 14
PAYLOAD = 15


class Fields(NamedTuple):
    """The top level of a received message; nested messages are still bytes."""

    call_id: int
    fence: bytes
    # The number of the call's or result's field; 0 if there is none.
    number: int
    body: bytes
    payload_start: int
    num_payload_bytes: int


def split(data: bytes, first: int, last: int) -> Fields:
    """Splits a message whose call or result has a field number from `first` to `last`.

    Raises:
        MalformedMessageError: the fields do not fit into the bytes.
    """
    call_id = number = payload_start = payload_end = 0
    fence = body = b""
    at, end = 0, len(data)
    while at < end:
        tag = data[at]
        # Most tags and lengths have one byte; these are read here, because every call does this.
        if tag & 7 == LENGTH_DELIMITED and at + 1 < end and (data[at + 1] | tag) < 0x80:
            start = at + 2
            at = start + data[at + 1]
        else:
            tag, start, at = _next_field(data, at, end)
        field = tag >> 3
        if at > end or not field:
            raise MalformedMessageError("a field that is longer than its message, or has number 0")
        if tag & 7 == LENGTH_DELIMITED:
            if first <= field <= last:
                # As protobuf does: a repeated field is merged, and of two calls the last counts.
                body = body + data[start:at] if field == number else data[start:at]
                number = field
            elif field == FENCE:
                fence += data[start:at]
            elif field == PAYLOAD:
                payload_start, payload_end = start, at
        elif tag == CALL_ID << 3 | VARINT:
            call_id, _ = _read_varint(data, start, end)
    return Fields(call_id, fence, number, body, payload_start, payload_end - payload_start)


def _next_field(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """A field's tag, and where its content starts and ends."""
    tag, at = _read_varint(data, at, end)
    kind = tag & 7
    start = at
    if kind == LENGTH_DELIMITED:
        length, start = _read_varint(data, at, end)
        at = start + length
    elif kind == VARINT:
        _, at = _read_varint(data, at, end)
    elif kind in _FIXED_BYTES:
        at += _FIXED_BYTES[kind]
    else:
        raise MalformedMessageError(f"a field of wire type {kind}")
    return tag, start, at


def pack_field(number: int, message: Message) -> bytes:
    """A nested message as a field."""
    content = message.SerializeToString()
    return bytes([number << 3 | LENGTH_DELIMITED]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """A number in protobuf's encoding."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    return bytes((value & 0x7F | 0x80,)) + varint(value >> 7)


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number, and where it ends."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise MalformedMessageError("a varint without an end")
