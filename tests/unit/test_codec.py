"""What crosses the wire arrives as it left; what is no message is refused, and that is all."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milliways.model.sampling import pack_rows
from milliways.model.sampling_params import PARAMETERS, SampledToken, SampleRow, SamplingParams
from milliways.v1 import tensor_pb2
from milliways.v1 import worker_pb2 as pb
from milliways.wire import codec
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
from milliways.wire.sampling import decode_samples, encode_sample
from milliways.wire.tensors import (
    ALIGNMENT,
    INT32,
    MalformedMessageError,
    Payload,
    PayloadReader,
    lay_out,
    place_of,
)

VOCAB_SIZE = 100
UINT64 = st.integers(0, 2**64 - 1)
UINT32 = st.integers(0, 2**32 - 1)
SIZES = st.integers(0, 5)
ACTIVATION_TYPES = st.sampled_from([np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)])
# Random messages are small, and many machines slow.
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def array_of(draw: st.DrawFn, dtype: Any, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(draw(UINT32))
    if dtype == np.int32:
        return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


@st.composite
def all_params(draw: st.DrawFn) -> SamplingParams:
    fields: dict[str, Any] = {}
    for parameter in PARAMETERS:
        least, most = parameter.least, parameter.most
        if parameter.kind is int:
            fields[parameter.name] = draw(st.integers(int(least), int(most)))
        elif parameter.kind is float:
            usual = st.just(parameter.default)
            fields[parameter.name] = draw(st.one_of(usual, st.floats(least, most)))
        else:
            token_ids = st.integers(0, VOCAB_SIZE - 1)
            biases = st.dictionaries(token_ids, st.floats(least, most), max_size=4)
            fields[parameter.name] = draw(biases)
    return SamplingParams(**fields)


@st.composite
def sample_rows(draw: st.DrawFn) -> SampleRow:
    return SampleRow(
        params=draw(all_params()),
        token_ids=draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=9)),
        num_prompt_tokens=draw(st.integers(0, 9)),
        sample_index=draw(st.integers(0, 2**31 - 1)),
        given_id=draw(st.none() | st.integers(0, VOCAB_SIZE - 1)),
    )


@st.composite
def token_rows(draw: st.DrawFn, num_rows: int) -> TokenRows:
    def ints(*shape: int) -> np.ndarray:
        return array_of(draw, np.int32, *shape)

    return TokenRows(
        token_ids_T=ints(num_rows),
        positions_T=ints(num_rows),
        slots_T=ints(num_rows),
        block_tables_BM=ints(draw(SIZES), draw(SIZES)),
        logits_rows_W=ints(draw(SIZES)),
        samples=tuple(draw(st.lists(sample_rows(), max_size=2))),
    )


@st.composite
def calls(draw: st.DrawFn) -> Call:
    num_rows, width, layer = draw(SIZES), draw(SIZES), draw(UINT32)
    dtype = draw(ACTIVATION_TYPES)
    match draw(st.integers(0, 4)):
        case 0:
            ids_TA = array_of(draw, np.int32, num_rows, 2)
            return RunExperts(layer, array_of(draw, dtype, num_rows, width), ids_TA)
        case 1:
            has_hidden = draw(st.booleans())
            hidden = array_of(draw, np.float32, num_rows, width) if has_hidden else None
            return BeginBatch(draw(UINT64), layer, draw(token_rows(num_rows)), hidden)
        case 2:
            return AdvanceBatch(draw(UINT64), layer, array_of(draw, dtype, num_rows, 2, width))
        case 3:
            shape = (num_rows, draw(SIZES), 2, 1, width)
            return StoreBlocks(
                first_layer=layer,
                parent=draw(st.binary(max_size=16)),
                token_ids_CP=array_of(draw, np.int32, num_rows, 2),
                keys_CLPRK=array_of(draw, dtype, *shape),
                values_CLPRK=array_of(draw, dtype, *shape),
            )
        case _:
            return AbandonBatch(draw(UINT64))


@st.composite
def sampled_tokens(draw: st.DrawFn) -> SampledToken:
    is_valid = draw(st.booleans())
    numbers = st.floats(allow_nan=False, width=32)
    return SampledToken(
        token_id=draw(st.integers(0, 2**31 - 1)) if is_valid else -1,
        logprob=draw(numbers),
        top_logprobs=tuple(draw(st.lists(st.tuples(UINT32, numbers), max_size=3))),
        is_valid=is_valid,
    )


@st.composite
def results(draw: st.DrawFn) -> Result:
    num_rows, width = draw(SIZES), draw(SIZES)
    dtype = draw(ACTIVATION_TYPES)
    match draw(st.integers(0, 6)):
        case 0:
            return ExpertOutputs(array_of(draw, dtype, num_rows, width))
        case 1:
            ids_TA = array_of(draw, np.int32, num_rows, 2)
            return ExpertInput(draw(UINT32), array_of(draw, dtype, num_rows, width), ids_TA)
        case 2:
            return Departure(array_of(draw, np.float32, num_rows, width))
        case 3:
            return Drawn(tuple(draw(st.lists(sampled_tokens(), max_size=3))))
        case 4:
            return Refusal(draw(st.sampled_from(RefusalReason)), draw(st.text()), draw(UINT64))
        case 5:
            return BlocksStored(draw(UINT32))
        case _:
            return Abandoned()


FENCES = st.builds(
    Fence,
    placement_epoch=UINT64,
    incarnation=UINT64,
    step=UINT64,
    timeout_s=st.integers(0, 2**32 - 1).map(lambda ms: ms / 1000),
    router_id=st.text(max_size=9),
    router_incarnation=UINT64,
)


def assert_same(one: Any, other: Any) -> None:
    """Equal in type and content, arrays by their bits; a sample row's tokens are not looked at."""
    assert type(one) is type(other)
    if isinstance(one, SampleRow):
        assert_same_draws(one, other)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == other.tobytes()
    elif is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple) and not isinstance(one, str):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def assert_same_draws(row: SampleRow, other: SampleRow) -> None:
    """What drawing is given is the same bits, biases in any order."""
    assert row.params.num_logprobs == other.params.num_logprobs
    packed, other_packed = (pack_rows([each], VOCAB_SIZE, 64) for each in (row, other))
    for name in packed._fields:
        left, right = getattr(packed, name), getattr(other_packed, name)
        if name == "history_S" and not other.params.has_penalty:
            # A penalty that float32 rounds to none: tokens so far count for nothing.
            continue
        if name.startswith("bias_"):
            order = np.argsort(packed.bias_ids_J, axis=1, kind="stable")
            left = np.take_along_axis(left, order, axis=1)
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), name


class CallIn(NamedTuple):
    call_id: int
    fence: Fence
    call: Call


def decode_request(data: bytes) -> CallIn:
    fields = codec.split_request(data)
    reader = PayloadReader(data, fields.payload_start, fields.num_payload_bytes)
    return CallIn(fields.call_id, *codec.decode_request(fields, reader))


def decode_response(data: bytes) -> tuple[int, Result]:
    fields = codec.split_response(data)
    reader = PayloadReader(data, fields.payload_start, fields.num_payload_bytes)
    return fields.call_id, codec.decode_response(fields, reader)


@quick
@given(UINT64, calls(), FENCES)
def test_call_crosses_the_wire(call_id: int, call: Call, fence: Fence) -> None:
    request = decode_request(codec.join(codec.encode_request(call_id, call, fence)))
    assert (request.call_id, request.fence) == (call_id, fence)
    assert_same(call, request.call)


@quick
@given(UINT64, results())
def test_result_crosses_the_wire(call_id: int, result: Result) -> None:
    got_id, got = decode_response(codec.join(codec.encode_response(call_id, result)))
    assert got_id == call_id
    assert_same(result, got)


@quick
@given(calls(), FENCES, st.booleans())
def test_payload_travels_beside_its_header(call: Call, fence: Fence, is_shared: bool) -> None:
    header, payload = codec.encode_request(7, call, fence)
    room = memoryview(bytearray(payload.num_bytes + 64))
    payload.write_to(room, 64)
    reader = PayloadReader(room, 64, payload.num_bytes, is_shared=is_shared)
    assert_same(call, codec.decode_request(codec.split_request(header), reader).call)


@quick
@given(calls(), FENCES)
def test_protobuf_reads_what_is_joined(call: Call, fence: Fence) -> None:
    parts = codec.encode_request(7, call, fence)
    message = pb.ExchangeRequest.FromString(codec.join(parts))
    assert message.payload == b"".join(parts.payload.pieces())
    message.ClearField("payload")
    message.ClearField("padding")
    assert message == pb.ExchangeRequest.FromString(parts.header)


@quick
@given(calls(), FENCES, st.permutations(range(4)))
def test_fields_of_any_order_are_read(call: Call, fence: Fence, order: Sequence[int]) -> None:
    header, payload = codec.encode_request(7, call, fence)
    message = pb.ExchangeRequest.FromString(header)
    rest = pb.ExchangeRequest.FromString(header)
    rest.ClearField("fence")
    pieces = [
        pb.ExchangeRequest(fence=message.fence).SerializeToString(),
        rest.SerializeToString(),
        # The last payload counts.
        b"\x7a\x03abc" + pb.ExchangeRequest(payload=b"".join(payload.pieces())).SerializeToString(),
        # A field of a later version: number 200, a varint.
        b"\xc0\x0c\x05",
    ]
    if not payload.num_bytes:
        pieces[2] = b""
    request = decode_request(b"".join(pieces[i] for i in order))
    assert request.fence == fence
    assert_same(call, request.call)


def test_payload_arrives_aligned_and_uncopied() -> None:
    rows_TD = np.arange(12, dtype=np.float32).reshape(3, 4)
    ids_TA = np.arange(6, dtype=np.int32).reshape(3, 2)
    fence = next_fence()
    for router_id in ("r", "router-2", "a-router-with-a-longer-name"):
        parts = codec.encode_request(1, RunExperts(3, rows_TD, ids_TA), fence(router_id))
        data = codec.join(parts)
        call = decode_request(data).call
        assert isinstance(call, RunExperts)
        assert call.rows_TD.ctypes.data % 16 == 0
        assert call.rows_TD.flags.aligned and not call.rows_TD.flags.owndata


def next_fence() -> Any:
    def make(router_id: str) -> Fence:
        return Fence(
            placement_epoch=1,
            incarnation=2,
            step=3,
            timeout_s=1.5,
            router_id=router_id,
            router_incarnation=4,
        )

    return make


def test_timeout_never_becomes_none() -> None:
    for timeout_s, expected_s in ((0.0, 0.0), (1e-9, 0.001), (0.0016, 0.002), (1e9, 4294967.295)):
        fence = Fence(
            placement_epoch=0,
            incarnation=0,
            step=0,
            timeout_s=timeout_s,
            router_id="",
            router_incarnation=0,
        )
        data = codec.join(codec.encode_request(1, AbandonBatch(1), fence))
        assert decode_request(data).fence.timeout_s == expected_s


def test_strided_and_shared_arrays_are_sent_row_major() -> None:
    rows_TD = np.arange(12, dtype=np.float32).reshape(4, 3).T
    data = codec.join(codec.encode_response(1, Departure(rows_TD)))
    _, result = decode_response(data)
    assert isinstance(result, Departure)
    np.testing.assert_array_equal(result.hidden_TD, rows_TD)


@quick
@given(st.lists(sample_rows(), min_size=1, max_size=3))
def test_row_that_crossed_the_wire_draws_the_same(rows: list[SampleRow]) -> None:
    messages = [encode_sample(row) for row in rows]
    wire = [pb.SampleRow.FromString(message.SerializeToString()) for message in messages]
    for row, decoded in zip(rows, decode_samples(wire), strict=True):
        assert_same_draws(row, decoded)


def test_least_penalty_and_top_p_survive_float32() -> None:
    params = SamplingParams(repetition_penalty=0.01, top_p=1e-37)
    row = SampleRow(params=params, token_ids=(1,), num_prompt_tokens=1)
    (decoded,) = decode_samples([encode_sample(row)])
    assert (decoded.params.repetition_penalty, decoded.params.top_p) == (0.01, 1e-37)


def test_tokens_travel_only_where_a_penalty_reads_them() -> None:
    for penalty, expected in ((0.0, []), (0.5, [5, 6, 7])):
        params = SamplingParams(presence_penalty=penalty)
        row = SampleRow(params=params, token_ids=(5, 6, 7), num_prompt_tokens=1)
        message = encode_sample(row)
        assert list(message.token_ids) == expected
        (decoded,) = decode_samples([message])
        assert len(decoded.token_ids) == 3


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), results(), FENCES, st.data())
def test_no_bytes_do_more_than_be_refused(
    call: Call, result: Result, fence: Fence, data: st.DataObject
) -> None:
    for message, decode in (
        (codec.join(codec.encode_request(1, call, fence)), decode_request),
        (codec.join(codec.encode_response(1, result)), decode_response),
    ):
        mutated = bytearray(message)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, max(len(mutated) - 1, 0)))
            match data.draw(st.integers(0, 2)):
                case 0:
                    mutated[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
                case 1:
                    del mutated[at : at + data.draw(st.integers(1, 9))]
                case _:
                    mutated[at:at] = data.draw(st.binary(max_size=9))
        try:
            decode(bytes(mutated))
        except MalformedMessageError:
            continue


@given(st.binary(max_size=64))
@settings(deadline=None)
def test_noise_is_refused(noise: bytes) -> None:
    for decode in (decode_request, decode_response):
        try:
            decode(noise)
        except MalformedMessageError:
            continue


@pytest.mark.parametrize(
    "spec",
    [
        {"shape": [2, 4]},
        {"element_type": 1, "shape": [2, 4]},
        {"element_type": 99, "shape": [2, 4]},
        {"element_type": 3, "shape": [8]},
        {"element_type": 3, "shape": []},
        {"element_type": 3, "shape": [-1, -8]},
        {"element_type": 3, "shape": [2, 5]},
        {"element_type": 3, "shape": [2**62, 4]},
        {"element_type": 3, "shape": [0, 2**62]},
        {"element_type": 3, "shape": [2, 4], "offset_bytes": 4},
        {"element_type": 3, "shape": [2, 4], "offset_bytes": 64},
        {"element_type": 3, "shape": [2, 4], "offset_bytes": 2**64 - 64},
    ],
)
def test_tensor_that_cannot_be_is_refused(spec: dict[str, Any]) -> None:
    reader = PayloadReader(bytes(32), 0, 32)
    fits = tensor_pb2.TensorSpec(element_type=3, shape=[2, 4])
    assert reader.read(place_of(fits, INT32, 2)).shape == (2, 4)
    with pytest.raises(MalformedMessageError):
        reader.read(place_of(tensor_pb2.TensorSpec(**spec), INT32, 2))


def test_rows_of_different_number_are_refused() -> None:
    rows_TD, ids_TA = np.zeros((3, 4), np.float32), np.zeros((2, 2), np.int32)
    data = codec.join(codec.encode_request(1, RunExperts(0, rows_TD, ids_TA), next_fence()("r")))
    with pytest.raises(MalformedMessageError, match="rows and expert_ids have 3 and 2 rows"):
        decode_request(data)


def test_unknown_reason_of_a_refusal_counts_as_a_fault() -> None:
    message = pb.ExchangeResponse(refusal=pb.Refusal(reason=77, message="new"))  # pyright: ignore[reportArgumentType]
    _, result = decode_response(message.SerializeToString())
    assert result == Refusal(RefusalReason.FAULT, "new")


@quick
@given(st.lists(SIZES, max_size=4))
def test_arrays_lie_at_multiples_of_the_alignment(sizes: list[int]) -> None:
    layout = lay_out(*((np.dtype(np.int32), (size,)) for size in sizes))
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    arrays = [np.ones(size, np.int32) for size in sizes]
    payload = Payload(arrays, layout.offsets, layout.num_bytes)
    assert len(b"".join(payload.pieces())) == payload.num_bytes
