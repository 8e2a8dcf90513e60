"""Lists the tensors of a model of a given shape, and the file that holds each of them.

The release numbers its files in the order in which JAX flattens a tree with string keys. So the
order of the layers is 0, 1, 10, 11, ..., 19, 2, 20, ... A loader that counts 0, 1, 2 is wrong from
layer 2 on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

import numpy as np

from milliways.model.checkpoint.records import (
    BFLOAT16,
    FLOAT32,
    INT8,
    ArrayRecord,
    PlainArray,
    QuantizedArray,
    TensorRecord,
    describe_array,
)
from milliways.model.config import ModelConfig
from milliways.model.errors import TensorLayoutError

TENSOR_PREFIX = "tensor"


class TensorRole(Enum):
    """The role of a tensor. The value is its name in the release.

    The order is that of the files: the shared tensors, then the tensors of a layer.
    """

    EMBEDDING = "language_model/in_out_embed/embeddings"
    FINAL_NORM = "language_model/rms_norm/scale"
    # The expert is linear_1(gelu(linear(x)) * linear_v(x)).
    EXPERT_LINEAR = "moe/linear/w"
    EXPERT_LINEAR_1 = "moe/linear_1/w"
    EXPERT_LINEAR_V = "moe/linear_v/w"
    KEY = "multi_head_attention/key/w"
    ATTENTION_OUT = "multi_head_attention/linear/w"
    QUERY = "multi_head_attention/query/w"
    VALUE = "multi_head_attention/value/w"
    PRE_ATTENTION_NORM = "rms_norm/scale"
    POST_ATTENTION_NORM = "rms_norm_1/scale"
    PRE_MOE_NORM = "rms_norm_2/scale"
    POST_MOE_NORM = "rms_norm_3/scale"
    GATE = "router/w"

    @property
    def in_layer(self) -> bool:
        return self not in (TensorRole.EMBEDDING, TensorRole.FINAL_NORM)

    @property
    def is_expert(self) -> bool:
        return self.value.startswith("moe/")

    @property
    def is_quantized(self) -> bool:
        return self.is_expert or self.value.startswith("multi_head_attention/")


LAYER_ROLES = tuple(role for role in TensorRole if role.in_layer)
NUM_SHARED_TENSORS = len(TensorRole) - len(LAYER_ROLES)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the layout. `shape` is the shape of the weights, without scales."""

    index: int
    file_name: str
    name: str
    layer: int | None
    role: TensorRole
    shape: tuple[int, ...]
    quantized: bool


def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor of the model, in file order."""
    return tuple(_spec(config, index, role, layer) for index, (role, layer) in _in_order(config))


def layers_in_file_order(num_layers: int) -> list[int]:
    """Layer numbers in the order of their files: sorted as strings."""
    return sorted(range(num_layers), key=str)


def _in_order(config: ModelConfig) -> Iterator[tuple[int, tuple[TensorRole, int | None]]]:
    shared = [(role, None) for role in TensorRole if not role.in_layer]
    layers = layers_in_file_order(config.num_layers)
    return enumerate([*shared, *((role, layer) for layer in layers for role in LAYER_ROLES)])


def _spec(config: ModelConfig, index: int, role: TensorRole, layer: int | None) -> TensorSpec:
    name = role.value if layer is None else f"transformer/decoder_layer_{layer}/{role.value}"
    return TensorSpec(
        index=index,
        file_name=f"{TENSOR_PREFIX}{index:05d}_000",
        name=name,
        layer=layer,
        role=role,
        shape=tensor_shape(config, role),
        quantized=role.is_quantized,
    )


def tensor_shape(config: ModelConfig, role: TensorRole) -> tuple[int, ...]:
    """The shape of the weights of one role: [in, out], or [experts, in, out]."""
    emb_size, ffn_size, num_experts = config.emb_size, config.ffn_size, config.num_experts
    match role:
        case TensorRole.EMBEDDING:
            return (config.vocab_size, emb_size)
        case TensorRole.EXPERT_LINEAR | TensorRole.EXPERT_LINEAR_V:
            return (num_experts, emb_size, ffn_size)
        case TensorRole.EXPERT_LINEAR_1:
            return (num_experts, ffn_size, emb_size)
        case TensorRole.KEY | TensorRole.VALUE:
            return (emb_size, config.kv_size)
        case TensorRole.QUERY:
            return (emb_size, config.q_size)
        case TensorRole.ATTENTION_OUT:
            return (config.q_size, emb_size)
        case TensorRole.GATE:
            return (emb_size, num_experts)
        case (
            TensorRole.FINAL_NORM
            | TensorRole.PRE_ATTENTION_NORM
            | TensorRole.POST_ATTENTION_NORM
            | TensorRole.PRE_MOE_NORM
            | TensorRole.POST_MOE_NORM
        ):
            return (emb_size,)
    assert_never(role)


def check_tensor(spec: TensorSpec, record: TensorRecord, hint: str = "") -> None:
    """Compares the contents of a file with what the layout expects.

    Raises:
        TensorLayoutError: kind, shape or dtype differ. The message says what was expected and what
            was found.
    """
    fits = (
        isinstance(record, QuantizedArray) and _quantized_fits(spec, record.weight, record.scales)
        if spec.quantized
        else isinstance(record, PlainArray) and _is_array(record.array, FLOAT32, spec.shape)
    )
    if not fits:
        raise TensorLayoutError(
            record.path,
            f"{spec.name}: expected {expected(spec)}, found {record.describe()}{hint}",
        )


def _quantized_fits(spec: TensorSpec, weight: ArrayRecord, scales: ArrayRecord) -> bool:
    if not _is_array(weight, INT8, spec.shape):
        return False
    return scales.dtype == BFLOAT16 and scales_fit(spec.shape, scales.shape)


def _is_array(record: ArrayRecord, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    return record.dtype == dtype and record.shape == shape


def scales_fit(weight_shape: tuple[int, ...], scales_shape: tuple[int, ...]) -> bool:
    """Whether scales [..., G, N] fit weights [..., K, N]: G blocks of K/G rows each."""
    if len(scales_shape) != len(weight_shape):
        return False
    *lead, num_rows, num_columns = weight_shape
    *scales_lead, num_blocks, num_scales = scales_shape
    if scales_lead != lead or num_scales != num_columns:
        return False
    return num_blocks >= 1 and num_rows % num_blocks == 0


def expected(spec: TensorSpec) -> str:
    """Describes the expected tensor, for messages."""
    if not spec.quantized:
        return f"plain {describe_array(FLOAT32, spec.shape)}"
    *lead, num_rows, num_columns = spec.shape
    scales_axes = ", ".join([*map(str, lead), "G", str(num_columns)])
    weight = describe_array(INT8, spec.shape)
    return f"quantised {weight} with scales bfloat16 [{scales_axes}], G dividing {num_rows}"
