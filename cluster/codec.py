"""Calls and results as messages of the wire: a small protobuf header and a payload of tensors.

    Call, Fence -> encode_request  -> Parts -> decode_request  -> Request
    Result      -> encode_response -> Parts -> decode_response -> Response

The tensors of a message lie one after another in its payload, each at a multiple of 64 bytes,
row-major and little-endian. In shared memory the payload travels beside the header. On gRPC both
are one protobuf message, but the payload does not go through protobuf, which would copy it three
times: `join` appends it as its field's tag, length and bytes, and `split` walks the top-level
fields to take it out again.

What comes in is checked here as far as reading it needs: types, ranks, sizes, places. Whether ids
and positions can be computed is for the worker's core to say. Arrays that come out are views.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from milliways.v1 import worker_pb2 as pb

from cluster.calls import (
    AbandonBatch,
    Abandoned,
    AdvanceBatch,
    BeginBatch,
    Call,
    Departure,
    Drawn,
    ExpertInput,
    ExpertOutputs,
    Fence,
    Refusal,
    Result,
    RunExperts,
    TokenRows,
)
from cluster.errors import RefusalReason
from cluster.wire_sampling import decode_drawn, decode_samples, encode_drawn, encode_sample
from cluster.wire_tensors import (
    ACTIVATIONS,
    FLOAT32,
    INT32,
    MalformedMessageError,
    Payload,
    PayloadReader,
)

_PADDING_FIELD = 14
_PAYLOAD_FIELD = 15
_LENGTH_DELIMITED = 2
_PADDING_TAG = bytes([_PADDING_FIELD << 3 | _LENGTH_DELIMITED])
_PAYLOAD_TAG = bytes([_PAYLOAD_FIELD << 3 | _LENGTH_DELIMITED])
# What `bytes` objects begin at a multiple of.
_JOIN_ALIGNMENT = 16
_MAX_TIMEOUT_MS = 2**32 - 1
_REASONS = {reason.value: reason for reason in RefusalReason}


class Parts(NamedTuple):
    """A message to be sent: its header, serialised, and the arrays of its payload."""

    header: bytes
    payload: Payload


class Request(NamedTuple):
    """A call that came in."""

    call_id: int
    fence: Fence
    call: Call


class Response(NamedTuple):
    """A result that came in."""

    call_id: int
    result: Result


def encode_request(call_id: int, call: Call, fence: Fence) -> Parts:
    """A call as a message."""
    payload = Payload()
    field, encode = _CALL_ENCODERS[type(call)]
    message = pb.ExchangeRequest(
        call_id=call_id, fence=_encode_fence(fence), **{field: encode(call, payload)}
    )
    return Parts(message.SerializeToString(), payload)


def encode_response(call_id: int, result: Result) -> Parts:
    """A result as a message."""
    payload = Payload()
    field, encode = _RESULT_ENCODERS[type(result)]
    message = pb.ExchangeResponse(call_id=call_id, **{field: encode(result, payload)})
    return Parts(message.SerializeToString(), payload)


def parse_request(header: bytes) -> pb.ExchangeRequest:
    """A request's header; raises MalformedMessageError."""
    return _parse(pb.ExchangeRequest(), header)


def parse_response(header: bytes) -> pb.ExchangeResponse:
    """A response's header; raises MalformedMessageError."""
    return _parse(pb.ExchangeResponse(), header)


def decode_request(message: pb.ExchangeRequest, payload: PayloadReader) -> Request:
    """The call of a header and its payload.

    Raises:
        MalformedMessageError: it is none.
    """
    field = message.WhichOneof("call")
    if field is None:
        raise MalformedMessageError("a request without a call")
    call = _CALL_DECODERS[field](getattr(message, field), payload)
    return Request(message.call_id, _decode_fence(message.fence), call)


def decode_response(message: pb.ExchangeResponse, payload: PayloadReader) -> Response:
    """The result of a header and its payload.

    Raises:
        MalformedMessageError: it is none.
    """
    field = message.WhichOneof("result")
    if field is None:
        raise MalformedMessageError("a response without a result")
    return Response(message.call_id, _RESULT_DECODERS[field](getattr(message, field), payload))


def join(parts: Parts) -> bytes:
    """One protobuf message, the payload last and aligned."""
    header, payload = parts
    if not payload.num_bytes:
        return header
    length = _varint(payload.num_bytes)
    # Two bytes of padding's tag and length, one of the payload's tag.
    num_before = len(header) + 3 + len(length)
    num_padding = -num_before % _JOIN_ALIGNMENT
    padding = bytes([*_PADDING_TAG, num_padding]) + bytes(num_padding)
    return b"".join([header, padding, _PAYLOAD_TAG, length, *payload.pieces()])


def split(data: bytes) -> tuple[bytes, memoryview]:
    """Header, and payload as a view, of what `join` or any other protobuf writer put together.

    Raises:
        MalformedMessageError: the fields do not fit into the bytes.
    """
    view = memoryview(data)
    payload = view[:0]
    kept_from = 0
    kept: list[memoryview] = []
    end = len(data)
    at = 0
    while at < end:
        start = at
        tag, at = _read_varint(data, at, end)
        field, kind = tag >> 3, tag & 7
        first = at
        at, first = _skip_value(data, at, end, kind)
        if field in (_PAYLOAD_FIELD, _PADDING_FIELD) and kind == _LENGTH_DELIMITED:
            kept.append(view[kept_from:start])
            kept_from = at
            if field == _PAYLOAD_FIELD:
                # The last one counts, as with any field of protobuf.
                payload = view[first:at]
    if not kept:
        return data, payload
    return b"".join([*kept, view[kept_from:]]), payload


def _parse(message: Any, header: bytes) -> Any:
    try:
        message.ParseFromString(header)
    except DecodeError as error:
        raise MalformedMessageError(str(error)) from error
    return message


def _encode_fence(fence: Fence) -> pb.Fence:
    timeout_ms = 0
    if fence.timeout_s:
        # Never 0, which is no limit.
        timeout_ms = min(max(round(fence.timeout_s * 1000), 1), _MAX_TIMEOUT_MS)
    return pb.Fence(
        placement_epoch=fence.placement_epoch,
        incarnation=fence.incarnation,
        step=fence.step,
        timeout_ms=timeout_ms,
        router_id=fence.router_id,
        router_incarnation=fence.router_incarnation,
    )


def _decode_fence(fence: pb.Fence) -> Fence:
    return Fence(
        placement_epoch=fence.placement_epoch,
        incarnation=fence.incarnation,
        step=fence.step,
        timeout_s=fence.timeout_ms / 1000,
        router_id=fence.router_id,
        router_incarnation=fence.router_incarnation,
    )


def _encode_run_experts(call: RunExperts, payload: Payload) -> pb.RunExpertsCall:
    rows = payload.add(call.rows_TD)
    return pb.RunExpertsCall(
        layer=call.layer, rows=rows, expert_ids=payload.add(call.expert_ids_TA)
    )


def _decode_run_experts(message: pb.RunExpertsCall, payload: PayloadReader) -> RunExperts:
    rows_TD = payload.read(message.rows, ACTIVATIONS, 2)
    expert_ids_TA = payload.read_to_keep(message.expert_ids, INT32, 2)
    _check_equal("rows and expert_ids", len(rows_TD), len(expert_ids_TA))
    return RunExperts(message.layer, rows_TD, expert_ids_TA)


def _encode_begin_batch(call: BeginBatch, payload: Payload) -> pb.BeginBatchCall:
    tokens = call.tokens
    return pb.BeginBatchCall(
        batch_id=call.batch_id,
        layer=call.layer,
        token_ids=payload.add(tokens.token_ids_T),
        positions=payload.add(tokens.positions_T),
        slots=payload.add(tokens.slots_T),
        block_tables=payload.add(tokens.block_tables_BM),
        logits_rows=payload.add(tokens.logits_rows_W),
        hidden=None if call.hidden_TD is None else payload.add(call.hidden_TD),
        samples=[encode_sample(row) for row in tokens.samples],
    )


def _decode_begin_batch(message: pb.BeginBatchCall, payload: PayloadReader) -> BeginBatch:
    # A shard keeps the tokens, and maybe the residual stream, for the turns that follow.
    token_ids_T = payload.read_to_keep(message.token_ids, INT32, 1)
    tokens = TokenRows(
        token_ids_T=token_ids_T,
        positions_T=payload.read_to_keep(message.positions, INT32, 1),
        slots_T=payload.read_to_keep(message.slots, INT32, 1),
        block_tables_BM=payload.read_to_keep(message.block_tables, INT32, 2),
        logits_rows_W=payload.read_to_keep(message.logits_rows, INT32, 1),
        samples=decode_samples(message.samples),
    )
    _check_equal("token_ids and positions", len(token_ids_T), len(tokens.positions_T))
    _check_equal("token_ids and slots", len(token_ids_T), len(tokens.slots_T))
    hidden_TD = None
    if message.HasField("hidden"):
        hidden_TD = payload.read_to_keep(message.hidden, FLOAT32, 2)
        _check_equal("token_ids and hidden", len(token_ids_T), len(hidden_TD))
    return BeginBatch(message.batch_id, message.layer, tokens, hidden_TD)


def _encode_advance_batch(call: AdvanceBatch, payload: Payload) -> pb.AdvanceBatchCall:
    return pb.AdvanceBatchCall(
        batch_id=call.batch_id, layer=call.layer, outputs=payload.add(call.outputs_TAD)
    )


def _decode_advance_batch(message: pb.AdvanceBatchCall, payload: PayloadReader) -> AdvanceBatch:
    outputs_TAD = payload.read(message.outputs, ACTIVATIONS, 3)
    return AdvanceBatch(message.batch_id, message.layer, outputs_TAD)


def _encode_abandon_batch(call: AbandonBatch, payload: Payload) -> pb.AbandonBatchCall:
    return pb.AbandonBatchCall(batch_id=call.batch_id)


def _decode_abandon_batch(message: pb.AbandonBatchCall, payload: PayloadReader) -> AbandonBatch:
    return AbandonBatch(message.batch_id)


def _encode_expert_outputs(result: ExpertOutputs, payload: Payload) -> pb.ExpertOutputs:
    return pb.ExpertOutputs(rows=payload.add(result.rows_ND))


def _decode_expert_outputs(message: pb.ExpertOutputs, payload: PayloadReader) -> ExpertOutputs:
    return ExpertOutputs(payload.read(message.rows, ACTIVATIONS, 2))


def _encode_expert_input(result: ExpertInput, payload: Payload) -> pb.ExpertInput:
    rows = payload.add(result.rows_TD)
    return pb.ExpertInput(
        layer=result.layer, rows=rows, expert_ids=payload.add(result.expert_ids_TA)
    )


def _decode_expert_input(message: pb.ExpertInput, payload: PayloadReader) -> ExpertInput:
    rows_TD = payload.read(message.rows, ACTIVATIONS, 2)
    expert_ids_TA = payload.read(message.expert_ids, INT32, 2)
    _check_equal("rows and expert_ids", len(rows_TD), len(expert_ids_TA))
    return ExpertInput(message.layer, rows_TD, expert_ids_TA)


def _encode_departure(result: Departure, payload: Payload) -> pb.Departure:
    return pb.Departure(hidden=payload.add(result.hidden_TD))


def _decode_departure(message: pb.Departure, payload: PayloadReader) -> Departure:
    return Departure(payload.read(message.hidden, FLOAT32, 2))


def _encode_drawn_tokens(result: Drawn, payload: Payload) -> pb.DrawnTokens:
    return pb.DrawnTokens(tokens=encode_drawn(result.tokens))


def _decode_drawn_tokens(message: pb.DrawnTokens, payload: PayloadReader) -> Drawn:
    return Drawn(decode_drawn(message.tokens))


def _encode_abandoned(result: Abandoned, payload: Payload) -> pb.Abandoned:
    return pb.Abandoned()


def _decode_abandoned(message: pb.Abandoned, payload: PayloadReader) -> Abandoned:
    return Abandoned()


def _encode_refusal(result: Refusal, payload: Payload) -> pb.Refusal:
    return pb.Refusal(
        reason=pb.RefusalReason.Name(result.reason.value),
        message=result.message,
        placement_epoch=result.placement_epoch,
    )


def _decode_refusal(message: pb.Refusal, payload: PayloadReader) -> Refusal:
    # A reason that is news to this side is a fault of the other to it.
    reason = _REASONS.get(message.reason, RefusalReason.FAULT)
    return Refusal(reason, message.message, message.placement_epoch)


_Encoders = dict[type[Any], tuple[str, Callable[[Any, Payload], Any]]]
_Decoders = dict[str, Callable[[Any, PayloadReader], Any]]

_CALL_ENCODERS: _Encoders = {
    RunExperts: ("run_experts", _encode_run_experts),
    BeginBatch: ("begin_batch", _encode_begin_batch),
    AdvanceBatch: ("advance_batch", _encode_advance_batch),
    AbandonBatch: ("abandon_batch", _encode_abandon_batch),
}
_CALL_DECODERS: _Decoders = {
    "run_experts": _decode_run_experts,
    "begin_batch": _decode_begin_batch,
    "advance_batch": _decode_advance_batch,
    "abandon_batch": _decode_abandon_batch,
}
_RESULT_ENCODERS: _Encoders = {
    ExpertOutputs: ("expert_outputs", _encode_expert_outputs),
    ExpertInput: ("expert_input", _encode_expert_input),
    Departure: ("departure", _encode_departure),
    Drawn: ("drawn_tokens", _encode_drawn_tokens),
    Refusal: ("refusal", _encode_refusal),
    Abandoned: ("abandoned", _encode_abandoned),
}
_RESULT_DECODERS: _Decoders = {
    "expert_outputs": _decode_expert_outputs,
    "expert_input": _decode_expert_input,
    "departure": _decode_departure,
    "drawn_tokens": _decode_drawn_tokens,
    "refusal": _decode_refusal,
    "abandoned": _decode_abandoned,
}


def _check_equal(names: str, one: int, other: int) -> None:
    if one != other:
        raise MalformedMessageError(f"{names} have {one} and {other} rows")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


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
    raise MalformedMessageError("a number without an end")


def _skip_value(data: bytes, at: int, end: int, kind: int) -> tuple[int, int]:
    """Where a field's value ends, and where its content begins."""
    first = at
    if kind == _LENGTH_DELIMITED:
        length, first = _read_varint(data, at, end)
        at = first + length
    elif kind == 0:
        _, at = _read_varint(data, at, end)
    elif kind in (1, 5):
        at += 8 if kind == 1 else 4
    else:
        raise MalformedMessageError(f"a field of wire type {kind}")
    if at > end:
        raise MalformedMessageError("a field that is longer than its message")
    return at, first
