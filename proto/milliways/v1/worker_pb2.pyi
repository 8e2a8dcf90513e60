from milliways.v1 import sampling_pb2 as _sampling_pb2
from milliways.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_DIRECT: _ClassVar[Transport]
    TRANSPORT_SHM: _ClassVar[Transport]
    TRANSPORT_GRPC: _ClassVar[Transport]

class RefusalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_REASON_UNSPECIFIED: _ClassVar[RefusalReason]
    REFUSAL_REASON_STALE_EPOCH: _ClassVar[RefusalReason]
    REFUSAL_REASON_STALE_INCARNATION: _ClassVar[RefusalReason]
    REFUSAL_REASON_NOT_HELD: _ClassVar[RefusalReason]
    REFUSAL_REASON_EXPIRED: _ClassVar[RefusalReason]
    REFUSAL_REASON_OVERLOADED: _ClassVar[RefusalReason]
    REFUSAL_REASON_MALFORMED: _ClassVar[RefusalReason]
    REFUSAL_REASON_UNKNOWN_BATCH: _ClassVar[RefusalReason]
    REFUSAL_REASON_FAULT: _ClassVar[RefusalReason]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_DIRECT: Transport
TRANSPORT_SHM: Transport
TRANSPORT_GRPC: Transport
REFUSAL_REASON_UNSPECIFIED: RefusalReason
REFUSAL_REASON_STALE_EPOCH: RefusalReason
REFUSAL_REASON_STALE_INCARNATION: RefusalReason
REFUSAL_REASON_NOT_HELD: RefusalReason
REFUSAL_REASON_EXPIRED: RefusalReason
REFUSAL_REASON_OVERLOADED: RefusalReason
REFUSAL_REASON_MALFORMED: RefusalReason
REFUSAL_REASON_UNKNOWN_BATCH: RefusalReason
REFUSAL_REASON_FAULT: RefusalReason

class ReadPartRequest(_message.Message):
    __slots__ = ("tensor", "expert")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    expert: int
    def __init__(self, tensor: _Optional[str] = ..., expert: _Optional[int] = ...) -> None: ...

class ReadPartResponse(_message.Message):
    __slots__ = ("arrays", "piece")
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    arrays: _containers.RepeatedCompositeFieldContainer[PartArray]
    piece: bytes
    def __init__(self, arrays: _Optional[_Iterable[_Union[PartArray, _Mapping]]] = ..., piece: _Optional[bytes] = ...) -> None: ...

class PartArray(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("router_id", "host_id", "wanted")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    host_id: str
    wanted: Transport
    def __init__(self, router_id: _Optional[str] = ..., host_id: _Optional[str] = ..., wanted: _Optional[_Union[Transport, str]] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("worker_id", "incarnation", "transport", "socket_name", "endpoints")
    class EndpointsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SOCKET_NAME_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    transport: Transport
    socket_name: str
    endpoints: _containers.ScalarMap[str, str]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., transport: _Optional[_Union[Transport, str]] = ..., socket_name: _Optional[str] = ..., endpoints: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Fence(_message.Message):
    __slots__ = ("placement_epoch", "incarnation", "step", "timeout_ms", "router_id", "router_incarnation")
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    placement_epoch: int
    incarnation: int
    step: int
    timeout_ms: int
    router_id: str
    router_incarnation: int
    def __init__(self, placement_epoch: _Optional[int] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., router_id: _Optional[str] = ..., router_incarnation: _Optional[int] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("call_id", "fence", "run_experts", "begin_batch", "advance_batch", "abandon_batch", "store_blocks", "padding", "payload")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    RUN_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_BATCH_FIELD_NUMBER: _ClassVar[int]
    ADVANCE_BATCH_FIELD_NUMBER: _ClassVar[int]
    ABANDON_BATCH_FIELD_NUMBER: _ClassVar[int]
    STORE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    fence: Fence
    run_experts: RunExpertsCall
    begin_batch: BeginBatchCall
    advance_batch: AdvanceBatchCall
    abandon_batch: AbandonBatchCall
    store_blocks: StoreBlocksCall
    padding: bytes
    payload: bytes
    def __init__(self, call_id: _Optional[int] = ..., fence: _Optional[_Union[Fence, _Mapping]] = ..., run_experts: _Optional[_Union[RunExpertsCall, _Mapping]] = ..., begin_batch: _Optional[_Union[BeginBatchCall, _Mapping]] = ..., advance_batch: _Optional[_Union[AdvanceBatchCall, _Mapping]] = ..., abandon_batch: _Optional[_Union[AbandonBatchCall, _Mapping]] = ..., store_blocks: _Optional[_Union[StoreBlocksCall, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class RunExpertsCall(_message.Message):
    __slots__ = ("layer", "rows", "expert_ids")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rows: _tensor_pb2.TensorSpec
    expert_ids: _tensor_pb2.TensorSpec
    def __init__(self, layer: _Optional[int] = ..., rows: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., expert_ids: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...

class BeginBatchCall(_message.Message):
    __slots__ = ("batch_id", "layer", "token_ids", "positions", "slots", "block_tables", "logits_rows", "hidden", "samples")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    layer: int
    token_ids: _tensor_pb2.TensorSpec
    positions: _tensor_pb2.TensorSpec
    slots: _tensor_pb2.TensorSpec
    block_tables: _tensor_pb2.TensorSpec
    logits_rows: _tensor_pb2.TensorSpec
    hidden: _tensor_pb2.TensorSpec
    samples: _containers.RepeatedCompositeFieldContainer[SampleRow]
    def __init__(self, batch_id: _Optional[int] = ..., layer: _Optional[int] = ..., token_ids: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., positions: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., slots: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., block_tables: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., logits_rows: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., hidden: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[SampleRow, _Mapping]]] = ...) -> None: ...

class SampleRow(_message.Message):
    __slots__ = ("params", "position", "num_prompt_tokens", "sample_index", "token_ids", "given_token_id", "forbidden_token_ids", "allowed_token_ids")
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FORBIDDEN_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    params: _sampling_pb2.SamplingParams
    position: int
    num_prompt_tokens: int
    sample_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    given_token_id: int
    forbidden_token_ids: _containers.RepeatedScalarFieldContainer[int]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, params: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., position: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., sample_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., given_token_id: _Optional[int] = ..., forbidden_token_ids: _Optional[_Iterable[int]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class AdvanceBatchCall(_message.Message):
    __slots__ = ("batch_id", "layer", "outputs")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    layer: int
    outputs: _tensor_pb2.TensorSpec
    def __init__(self, batch_id: _Optional[int] = ..., layer: _Optional[int] = ..., outputs: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...

class AbandonBatchCall(_message.Message):
    __slots__ = ("batch_id",)
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    def __init__(self, batch_id: _Optional[int] = ...) -> None: ...

class StoreBlocksCall(_message.Message):
    __slots__ = ("first_layer", "parent", "token_ids", "keys", "values")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    parent: bytes
    token_ids: _tensor_pb2.TensorSpec
    keys: _tensor_pb2.TensorSpec
    values: _tensor_pb2.TensorSpec
    def __init__(self, first_layer: _Optional[int] = ..., parent: _Optional[bytes] = ..., token_ids: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., keys: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., values: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("call_id", "expert_outputs", "expert_input", "departure", "drawn_tokens", "refusal", "abandoned", "blocks_stored", "padding", "payload")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_INPUT_FIELD_NUMBER: _ClassVar[int]
    DEPARTURE_FIELD_NUMBER: _ClassVar[int]
    DRAWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_STORED_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    expert_outputs: ExpertOutputs
    expert_input: ExpertInput
    departure: Departure
    drawn_tokens: DrawnTokens
    refusal: Refusal
    abandoned: Abandoned
    blocks_stored: BlocksStored
    padding: bytes
    payload: bytes
    def __init__(self, call_id: _Optional[int] = ..., expert_outputs: _Optional[_Union[ExpertOutputs, _Mapping]] = ..., expert_input: _Optional[_Union[ExpertInput, _Mapping]] = ..., departure: _Optional[_Union[Departure, _Mapping]] = ..., drawn_tokens: _Optional[_Union[DrawnTokens, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., abandoned: _Optional[_Union[Abandoned, _Mapping]] = ..., blocks_stored: _Optional[_Union[BlocksStored, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ExpertOutputs(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _tensor_pb2.TensorSpec
    def __init__(self, rows: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...

class ExpertInput(_message.Message):
    __slots__ = ("layer", "rows", "expert_ids")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rows: _tensor_pb2.TensorSpec
    expert_ids: _tensor_pb2.TensorSpec
    def __init__(self, layer: _Optional[int] = ..., rows: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ..., expert_ids: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...

class Departure(_message.Message):
    __slots__ = ("hidden",)
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    hidden: _tensor_pb2.TensorSpec
    def __init__(self, hidden: _Optional[_Union[_tensor_pb2.TensorSpec, _Mapping]] = ...) -> None: ...

class DrawnTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[DrawnToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[DrawnToken, _Mapping]]] = ...) -> None: ...

class DrawnToken(_message.Message):
    __slots__ = ("token_id", "logprob", "top_token_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Abandoned(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlocksStored(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message", "placement_epoch")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    reason: RefusalReason
    message: str
    placement_epoch: int
    def __init__(self, reason: _Optional[_Union[RefusalReason, str]] = ..., message: _Optional[str] = ..., placement_epoch: _Optional[int] = ...) -> None: ...
