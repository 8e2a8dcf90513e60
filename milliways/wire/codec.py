"""Calls and results as messages: a small protobuf header, and a payload of tensors.

    Call, Fence -> encode_request  -> Parts ~> split_request  -> decode_request  -> Request
    Result      -> encode_response -> Parts ~> split_response -> decode_response -> Result

The tensors of a message lie one after another in its payload, each at a multiple of 64 bytes,
row-major and little-endian. With shared memory the payload travels beside the header. With gRPC
both are one protobuf message (`join`).

The bytes are those that protobuf would write, but protobuf handles only the nested messages. It
would copy the payload three times, so the fields of the top level are written and split by hand.
Nested messages repeat from call to call (a fence for all layers of a step, a layer's call for all
steps of a size), so their encoded and decoded forms are cached.

Received messages are checked as far as reading them needs: types, ranks, sizes, places. The
worker's core checks whether ids and positions can be computed. Decoded arrays are views.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from milliways.v1 import worker_pb2 as pb
from milliways.wire.calls import (
    AbandonBatch,
    Abandoned,
    AdvanceBatch,
    BeginBatch,
    BlocksStored,
    Call,
    Departure,
    Drawn,
    ExpertInput,
    ExpertOutputs,
    Fence,
    Refusal,
    Result,
    RunExperts,
    StoreBlocks,
    TokenRows,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.fields import (
    FENCE,
    LENGTH_DELIMITED,
    PADDING,
    PAYLOAD,
    Fields,
    pack_field,
    split,
    varint,
)
from milliways.wire.sampling import decode_drawn, decode_samples, encode_drawn, encode_sample
from milliways.wire.tensors import (
    ACTIVATIONS,
    FLOAT32,
    INT32,
    NO_PAYLOAD,
    NUM_FORMS,
    Layout,
    MalformedMessageError,
    Payload,
    PayloadReader,
    Place,
    Shape,
    lay_out,
    place_of,
)

# The address of a `bytes` object's data is a multiple of this.
_JOIN_ALIGNMENT = 16
# Field numbers of a request's calls and of a response's results.
_RUN_EXPERTS = _FIRST_CALL = 3
_BEGIN_BATCH = 4
_ADVANCE_BATCH = 5
_ABANDON_BATCH = 6
_STORE_BLOCKS = _LAST_CALL = 7
_EXPERT_OUTPUTS = _FIRST_RESULT = 2
_EXPERT_INPUT = 3
_DEPARTURE = 4
_DRAWN_TOKENS = 5
_REFUSAL = 6
_ABANDONED = 7
_BLOCKS_STORED = _LAST_RESULT = 8
_MAX_TIMEOUT_MS = 2**32 - 1
_NUM_FENCES = 64
_REASONS = {reason.value: reason for reason in RefusalReason}


class Parts(NamedTuple):
    """A message to be sent: its serialised header, and the arrays of its payload."""

    header: bytes
    payload: Payload


class Request(NamedTuple):
    """A received call."""

    fence: Fence
    call: Call


def encode_request(call_id: int, call: Call, fence: Fence) -> Parts:
    """A call as a message."""
    body, payload = _CALL_ENCODERS[type(call)](call)
    return Parts(b"\x08" + varint(call_id) + _fence_field(fence) + body, payload)


def encode_response(call_id: int, result: Result) -> Parts:
    """A result as a message."""
    body, payload = _RESULT_ENCODERS[type(result)](result)
    return Parts(b"\x08" + varint(call_id) + body, payload)


def decode_request(fields: Fields, payload: PayloadReader) -> Request:
    """Decodes a call.

    Raises:
        MalformedMessageError: the message has no call, or one that cannot be read.
    """
    decode = _CALL_DECODERS.get(fields.number)
    if decode is None:
        raise MalformedMessageError("a request without a call")
    return Request(_decode_fence(fields.fence), decode(fields.body, payload))


def decode_response(fields: Fields, payload: PayloadReader) -> Result:
    """Decodes a result.

    Raises:
        MalformedMessageError: the message has no result, or one that cannot be read.
    """
    decode = _RESULT_DECODERS.get(fields.number)
    if decode is None:
        raise MalformedMessageError("a response without a result")
    return decode(fields.body, payload)


def join(parts: Parts) -> bytes:
    """One protobuf message, with the payload last and aligned."""
    header, payload = parts
    if not payload.num_bytes:
        return header
    length = varint(payload.num_bytes)
    # Two bytes for the tag and length of the padding, one for the tag of the payload.
    num_padding = -(len(header) + 3 + len(length)) % _JOIN_ALIGNMENT
    return b"".join([header, _PADDINGS[num_padding], length, *payload.pieces()])


def split_request(data: bytes) -> Fields:
    """Splits the top level of a request, written by `join` or by any other protobuf writer.

    Raises:
        MalformedMessageError: the fields do not fit into the bytes.
    """
    return split(data, _FIRST_CALL, _LAST_CALL)


def split_response(data: bytes) -> Fields:
    """As `split_request`, of a response."""
    return split(data, _FIRST_RESULT, _LAST_RESULT)


@lru_cache(maxsize=_NUM_FENCES)
def _fence_field(fence: Fence) -> bytes:
    timeout_ms = 0
    if fence.timeout_s:
        # Never 0, because that means no limit.
        timeout_ms = min(max(round(fence.timeout_s * 1000), 1), _MAX_TIMEOUT_MS)
    message = pb.Fence(
        placement_epoch=fence.placement_epoch,
        incarnation=fence.incarnation,
        step=fence.step,
        timeout_ms=timeout_ms,
        router_id=fence.router_id,
        router_incarnation=fence.router_incarnation,
    )
    return pack_field(FENCE, message)


@lru_cache(maxsize=_NUM_FENCES)
def _decode_fence(data: bytes) -> Fence:
    fence = _parse(pb.Fence(), data)
    return Fence(
        placement_epoch=fence.placement_epoch,
        incarnation=fence.incarnation,
        step=fence.step,
        timeout_s=fence.timeout_ms / 1000,
        router_id=fence.router_id,
        router_incarnation=fence.router_incarnation,
    )


class _RowsPlan(NamedTuple):
    """The decoded form of a message with rows and the ids of a layer's experts."""

    layer: int
    rows: Place
    expert_ids: Place


def _run_experts_field(call: RunExperts) -> tuple[bytes, Payload]:
    rows_TD, ids_TA = call.rows_TD, call.expert_ids_TA
    field, layout = _rows_form(
        _RUN_EXPERTS, call.layer, rows_TD.dtype, rows_TD.shape, ids_TA.dtype, ids_TA.shape
    )
    return field, Payload((rows_TD, ids_TA), layout.offsets, layout.num_bytes)


def _expert_input_field(result: ExpertInput) -> tuple[bytes, Payload]:
    rows_TD, ids_TA = result.rows_TD, result.expert_ids_TA
    field, layout = _rows_form(
        _EXPERT_INPUT, result.layer, rows_TD.dtype, rows_TD.shape, ids_TA.dtype, ids_TA.shape
    )
    return field, Payload((rows_TD, ids_TA), layout.offsets, layout.num_bytes)


@lru_cache(maxsize=NUM_FORMS)
def _rows_form(
    number: int,
    layer: int,
    rows_dtype: np.dtype[Any],
    rows_shape: Shape,
    ids_dtype: np.dtype[Any],
    ids_shape: Shape,
) -> tuple[bytes, Layout]:
    layout = lay_out((rows_dtype, rows_shape), (ids_dtype, ids_shape))
    rows, expert_ids = layout.specs
    make = pb.RunExpertsCall if number == _RUN_EXPERTS else pb.ExpertInput
    return pack_field(number, make(layer=layer, rows=rows, expert_ids=expert_ids)), layout


@lru_cache(maxsize=NUM_FORMS)
def _rows_plan(data: bytes) -> _RowsPlan:
    """For both messages, because their fields are the same."""
    message = _parse(pb.RunExpertsCall(), data)
    rows = place_of(message.rows, ACTIVATIONS, 2)
    expert_ids = place_of(message.expert_ids, INT32, 2)
    _check_equal("rows and expert_ids", rows.shape[0], expert_ids.shape[0])
    return _RowsPlan(message.layer, rows, expert_ids)


def _decode_run_experts(data: bytes, payload: PayloadReader) -> RunExperts:
    layer, rows, expert_ids = _rows_plan(data)
    return RunExperts(layer, payload.read(rows), payload.read_to_keep(expert_ids))


def _decode_expert_input(data: bytes, payload: PayloadReader) -> ExpertInput:
    layer, rows, expert_ids = _rows_plan(data)
    return ExpertInput(layer, payload.read(rows), payload.read(expert_ids))


def _expert_outputs_field(result: ExpertOutputs) -> tuple[bytes, Payload]:
    rows_ND = result.rows_ND
    field, num_bytes = _expert_outputs_form(rows_ND.dtype, rows_ND.shape)
    return field, Payload((rows_ND,), (0,), num_bytes)


@lru_cache(maxsize=NUM_FORMS)
def _expert_outputs_form(dtype: np.dtype[Any], shape: Shape) -> tuple[bytes, int]:
    layout = lay_out((dtype, shape))
    return pack_field(_EXPERT_OUTPUTS, pb.ExpertOutputs(rows=layout.specs[0])), layout.num_bytes


@lru_cache(maxsize=NUM_FORMS)
def _expert_outputs_place(data: bytes) -> Place:
    return place_of(_parse(pb.ExpertOutputs(), data).rows, ACTIVATIONS, 2)


def _decode_expert_outputs(data: bytes, payload: PayloadReader) -> ExpertOutputs:
    return ExpertOutputs(payload.read(_expert_outputs_place(data)))


def _begin_batch_field(call: BeginBatch) -> tuple[bytes, Payload]:
    tokens = call.tokens
    arrays = [
        tokens.token_ids_T,
        tokens.positions_T,
        tokens.slots_T,
        tokens.block_tables_BM,
        tokens.logits_rows_W,
        *([] if call.hidden_TD is None else [call.hidden_TD]),
    ]
    payload, specs = _laid_out(arrays)
    message = pb.BeginBatchCall(
        batch_id=call.batch_id,
        layer=call.layer,
        token_ids=specs[0],
        positions=specs[1],
        slots=specs[2],
        block_tables=specs[3],
        logits_rows=specs[4],
        hidden=None if call.hidden_TD is None else specs[5],
        samples=[encode_sample(row) for row in tokens.samples],
    )
    return pack_field(_BEGIN_BATCH, message), payload


def _decode_begin_batch(data: bytes, payload: PayloadReader) -> BeginBatch:
    message = _parse(pb.BeginBatchCall(), data)

    # Copied if shared: a shard keeps the tokens, and perhaps the residual stream, for later turns.
    def ints(spec: Any, rank: int) -> np.ndarray:
        return payload.read_to_keep(place_of(spec, INT32, rank))

    tokens = TokenRows(
        token_ids_T=ints(message.token_ids, 1),
        positions_T=ints(message.positions, 1),
        slots_T=ints(message.slots, 1),
        block_tables_BM=ints(message.block_tables, 2),
        logits_rows_W=ints(message.logits_rows, 1),
        samples=decode_samples(message.samples),
    )
    _check_equal("token_ids and positions", tokens.num_rows, len(tokens.positions_T))
    _check_equal("token_ids and slots", tokens.num_rows, len(tokens.slots_T))
    hidden_TD = None
    if message.HasField("hidden"):
        hidden_TD = payload.read_to_keep(place_of(message.hidden, FLOAT32, 2))
        _check_equal("token_ids and hidden", tokens.num_rows, len(hidden_TD))
    return BeginBatch(message.batch_id, message.layer, tokens, hidden_TD)


def _advance_batch_field(call: AdvanceBatch) -> tuple[bytes, Payload]:
    payload, (outputs,) = _laid_out([call.outputs_TAD])
    message = pb.AdvanceBatchCall(batch_id=call.batch_id, layer=call.layer, outputs=outputs)
    return pack_field(_ADVANCE_BATCH, message), payload


def _decode_advance_batch(data: bytes, payload: PayloadReader) -> AdvanceBatch:
    message = _parse(pb.AdvanceBatchCall(), data)
    outputs_TAD = payload.read(place_of(message.outputs, ACTIVATIONS, 3))
    return AdvanceBatch(message.batch_id, message.layer, outputs_TAD)


def _abandon_batch_field(call: AbandonBatch) -> tuple[bytes, Payload]:
    return pack_field(_ABANDON_BATCH, pb.AbandonBatchCall(batch_id=call.batch_id)), NO_PAYLOAD


def _decode_abandon_batch(data: bytes, payload: PayloadReader) -> AbandonBatch:
    return AbandonBatch(_parse(pb.AbandonBatchCall(), data).batch_id)


def _store_blocks_field(call: StoreBlocks) -> tuple[bytes, Payload]:
    arrays = [call.token_ids_CP, call.keys_CLPRK, call.values_CLPRK]
    payload, (token_ids, keys, values) = _laid_out(arrays)
    message = pb.StoreBlocksCall(
        first_layer=call.first_layer,
        parent=call.parent,
        token_ids=token_ids,
        keys=keys,
        values=values,
    )
    return pack_field(_STORE_BLOCKS, message), payload


def _decode_store_blocks(data: bytes, payload: PayloadReader) -> StoreBlocks:
    message = _parse(pb.StoreBlocksCall(), data)
    # Views are enough, because the worker uses them only before it answers.
    call = StoreBlocks(
        first_layer=message.first_layer,
        parent=message.parent,
        token_ids_CP=payload.read(place_of(message.token_ids, INT32, 2)),
        keys_CLPRK=payload.read(place_of(message.keys, ACTIVATIONS, 5)),
        values_CLPRK=payload.read(place_of(message.values, ACTIVATIONS, 5)),
    )
    _check_equal("token_ids and keys", len(call.token_ids_CP), len(call.keys_CLPRK))
    _check_equal("keys and values", len(call.keys_CLPRK), len(call.values_CLPRK))
    return call


def _departure_field(result: Departure) -> tuple[bytes, Payload]:
    payload, (hidden,) = _laid_out([result.hidden_TD])
    return pack_field(_DEPARTURE, pb.Departure(hidden=hidden)), payload


def _decode_departure(data: bytes, payload: PayloadReader) -> Departure:
    return Departure(payload.read(place_of(_parse(pb.Departure(), data).hidden, FLOAT32, 2)))


def _drawn_tokens_field(result: Drawn) -> tuple[bytes, Payload]:
    return pack_field(_DRAWN_TOKENS, pb.DrawnTokens(tokens=encode_drawn(result.tokens))), NO_PAYLOAD


def _decode_drawn_tokens(data: bytes, payload: PayloadReader) -> Drawn:
    return Drawn(decode_drawn(_parse(pb.DrawnTokens(), data).tokens))


def _abandoned_field(result: Abandoned) -> tuple[bytes, Payload]:
    return pack_field(_ABANDONED, pb.Abandoned()), NO_PAYLOAD


def _decode_abandoned(data: bytes, payload: PayloadReader) -> Abandoned:
    return Abandoned()


def _blocks_stored_field(result: BlocksStored) -> tuple[bytes, Payload]:
    message = pb.BlocksStored(num_blocks=result.num_blocks)
    return pack_field(_BLOCKS_STORED, message), NO_PAYLOAD


def _decode_blocks_stored(data: bytes, payload: PayloadReader) -> BlocksStored:
    return BlocksStored(_parse(pb.BlocksStored(), data).num_blocks)


def _refusal_field(result: Refusal) -> tuple[bytes, Payload]:
    message = pb.Refusal(
        reason=pb.RefusalReason.Name(result.reason.value),
        message=result.message,
        placement_epoch=result.placement_epoch,
    )
    return pack_field(_REFUSAL, message), NO_PAYLOAD


def _decode_refusal(data: bytes, payload: PayloadReader) -> Refusal:
    message = _parse(pb.Refusal(), data)
    # A reason that this side does not know, from a newer peer, counts as a fault.
    reason = _REASONS.get(message.reason, RefusalReason.FAULT)
    return Refusal(reason, message.message, message.placement_epoch)


_CALL_ENCODERS: dict[type[Any], Callable[[Any], tuple[bytes, Payload]]] = {
    RunExperts: _run_experts_field,
    BeginBatch: _begin_batch_field,
    AdvanceBatch: _advance_batch_field,
    AbandonBatch: _abandon_batch_field,
    StoreBlocks: _store_blocks_field,
}
_CALL_DECODERS: dict[int, Callable[[bytes, PayloadReader], Call]] = {
    _RUN_EXPERTS: _decode_run_experts,
    _BEGIN_BATCH: _decode_begin_batch,
    _ADVANCE_BATCH: _decode_advance_batch,
    _ABANDON_BATCH: _decode_abandon_batch,
    _STORE_BLOCKS: _decode_store_blocks,
}
_RESULT_ENCODERS: dict[type[Any], Callable[[Any], tuple[bytes, Payload]]] = {
    ExpertOutputs: _expert_outputs_field,
    ExpertInput: _expert_input_field,
    Departure: _departure_field,
    Drawn: _drawn_tokens_field,
    Refusal: _refusal_field,
    Abandoned: _abandoned_field,
    BlocksStored: _blocks_stored_field,
}
_RESULT_DECODERS: dict[int, Callable[[bytes, PayloadReader], Result]] = {
    _EXPERT_OUTPUTS: _decode_expert_outputs,
    _EXPERT_INPUT: _decode_expert_input,
    _DEPARTURE: _decode_departure,
    _DRAWN_TOKENS: _decode_drawn_tokens,
    _REFUSAL: _decode_refusal,
    _ABANDONED: _decode_abandoned,
    _BLOCKS_STORED: _decode_blocks_stored,
}


def _laid_out(arrays: list[np.ndarray]) -> tuple[Payload, tuple[Any, ...]]:
    layout = lay_out(*((array.dtype, array.shape) for array in arrays))
    return Payload(arrays, layout.offsets, layout.num_bytes), layout.specs


def _parse(message: Any, data: bytes) -> Any:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise MalformedMessageError(str(error)) from error
    return message


def _check_equal(names: str, one: int, other: int) -> None:
    if one != other:
        raise MalformedMessageError(f"{names} have {one} and {other} rows")


_PADDINGS = [
    bytes([PADDING << 3 | LENGTH_DELIMITED, num_bytes, *bytes(num_bytes)])
    + bytes([PAYLOAD << 3 | LENGTH_DELIMITED])
    for num_bytes in range(_JOIN_ALIGNMENT)
]
