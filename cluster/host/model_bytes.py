"""How many bytes the parts of a model take, for the planner: counted, not estimated."""

import math

from milliways.cluster.settings.config import WorkerSettings
from milliways.model.checkpoint import Checkpoint
from milliways.model.checkpoint.layout import TensorRole, TensorSpec, tensor_specs
from milliways.model.config import ModelConfig
from milliways.wire.placement import ModelBytes

# Scale rows of the matrices that the release quantised in row blocks; 1 elsewhere.
_RELEASED_SCALE_ROWS = {TensorRole.EXPERT_LINEAR_1: 8, TensorRole.ATTENTION_OUT: 8}
_FLOAT32_BYTES = 4
_SCALE_BYTES = 2
# If no size is set, an attention shard has KV cache for this many sequences of full length.
CONTEXTS_BY_DEFAULT = 8


def kv_tokens_of(settings: WorkerSettings, sequence_len: int) -> int:
    """Positions of KV cache on an attention shard, for a model of this context length."""
    return settings.kv_tokens or CONTEXTS_BY_DEFAULT * sequence_len


def checkpoint_bytes(checkpoint: Checkpoint, kv_value_bytes: int) -> ModelBytes:
    """The sizes of a checkpoint's parts in its files."""
    sizes = {
        spec.index: sum(array.num_bytes for array in record.arrays)
        for spec, record in zip(checkpoint.specs, checkpoint.records, strict=True)
    }
    return _add_up(checkpoint.config, sizes, kv_value_bytes)


def released_bytes(config: ModelConfig, kv_value_bytes: int) -> ModelBytes:
    """The sizes of a model in the released form: int8 with bfloat16 scales."""
    sizes = {spec.index: _released_tensor_bytes(spec) for spec in tensor_specs(config)}
    return _add_up(config, sizes, kv_value_bytes)


def _released_tensor_bytes(spec: TensorSpec) -> int:
    if not spec.quantized:
        return math.prod(spec.shape) * _FLOAT32_BYTES
    *stack, _, num_out = spec.shape
    num_scale_rows = _RELEASED_SCALE_ROWS.get(spec.role, 1)
    return math.prod(spec.shape) + math.prod(stack) * num_scale_rows * num_out * _SCALE_BYTES


def _add_up(config: ModelConfig, sizes: dict[int, int], kv_value_bytes: int) -> ModelBytes:
    expert_bytes = attention_bytes = end_bytes = 0
    for spec in tensor_specs(config):
        if spec.role.is_expert:
            expert_bytes += sizes[spec.index]
        elif spec.role.in_layer:
            attention_bytes += sizes[spec.index]
        else:
            end_bytes += sizes[spec.index]
    return ModelBytes(
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        # Rounded up: layers may differ in their scale rows, and a plan must hold for the largest.
        expert_bytes=-(-expert_bytes // (config.num_layers * config.num_experts)),
        attention_layer_bytes=-(-attention_bytes // config.num_layers),
        end_bytes=end_bytes,
        kv_layer_bytes_per_token=2 * config.kv_size * kv_value_bytes,
        sequence_len=config.sequence_len,
    )
