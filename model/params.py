"""Parameters as the forward pass wants them: Flax dataclasses, cut where the cluster cuts.

A worker holds `AttentionParams` of some layers, `ExpertParams` of some experts of some layers, or
both; the ends of the chain hold `EndParams`. Loading copies each array once, from the mapped file
to the device, and touches nothing that the shard does not need.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int8

from model.checkpoint import Checkpoint, TensorRole


@struct.dataclass
class QuantizedMatrix:
    """int8 weights [in, out] with scale rows: W[g * K/G + r, n] = weight * scales[g, n].

    Stacks of matrices (experts) carry leading axes on both arrays.
    """

    weight: Int8[Array, "*stack K N"]
    scales: Float[Array, "*stack G N"]

    @property
    def num_scale_rows(self) -> int:
        return self.scales.shape[-2]


@struct.dataclass
class AttentionParams:
    """The attention half of one layer: both attention norms, both expert norms, and the gate.

    The expert norms live here because combining happens where the residual stream lives.
    """

    attention_norm_D: Float[Array, " D"]
    attention_post_norm_D: Float[Array, " D"]
    expert_norm_D: Float[Array, " D"]
    expert_post_norm_D: Float[Array, " D"]
    query: QuantizedMatrix
    key: QuantizedMatrix
    value: QuantizedMatrix
    out: QuantizedMatrix
    gate_DE: Float[Array, "D E"]


@struct.dataclass
class ExpertParams:
    """Experts of one layer, stacked on the first axis: gate [E,D,F], up [E,D,F], down [E,F,D]."""

    gate_proj: QuantizedMatrix
    up_proj: QuantizedMatrix
    down_proj: QuantizedMatrix

    @property
    def num_experts(self) -> int:
        return self.gate_proj.weight.shape[0]


@struct.dataclass
class EndParams:
    """What the first and the last shard of a chain need: the tied embedding and the final norm.

    The embedding stays float32 as released, also under bfloat16 activations: rounding the table, as
    the reference does, moves more gate decisions than any other rounding of the forward pass.
    """

    embedding_VD: Float[Array, "V D"]
    final_norm_D: Float[Array, " D"]


@struct.dataclass
class ModelParams:
    """A whole model in one process."""

    ends: EndParams
    attention_L: tuple[AttentionParams, ...]
    experts_L: tuple[ExpertParams, ...]


Place = Callable[[np.ndarray], jax.Array]


def load_model(checkpoint: Checkpoint, place: Place = jnp.asarray) -> ModelParams:
    """All parameters of a checkpoint; `place` puts one host array on the device."""
    layers = range(checkpoint.config.num_layers)
    return ModelParams(
        ends=load_ends(checkpoint, place),
        attention_L=tuple(load_attention(checkpoint, layer, place) for layer in layers),
        experts_L=tuple(load_experts(checkpoint, layer, place=place) for layer in layers),
    )


def load_ends(checkpoint: Checkpoint, place: Place = jnp.asarray) -> EndParams:
    """Embedding and final norm."""
    return EndParams(
        embedding_VD=place(checkpoint.plain(checkpoint.find(TensorRole.EMBEDDING))),
        final_norm_D=place(checkpoint.plain(checkpoint.find(TensorRole.FINAL_NORM))),
    )


def load_attention(
    checkpoint: Checkpoint, layer: int, place: Place = jnp.asarray
) -> AttentionParams:
    """The attention half of one layer."""

    def plain(role: TensorRole) -> jax.Array:
        return place(checkpoint.plain(checkpoint.find(role, layer)))

    def matrix(role: TensorRole) -> QuantizedMatrix:
        weight, scales = checkpoint.quantized(checkpoint.find(role, layer))
        return QuantizedMatrix(weight=place(weight), scales=place(scales))

    return AttentionParams(
        attention_norm_D=plain(TensorRole.PRE_ATTENTION_NORM),
        attention_post_norm_D=plain(TensorRole.POST_ATTENTION_NORM),
        expert_norm_D=plain(TensorRole.PRE_MOE_NORM),
        expert_post_norm_D=plain(TensorRole.POST_MOE_NORM),
        query=matrix(TensorRole.QUERY),
        key=matrix(TensorRole.KEY),
        value=matrix(TensorRole.VALUE),
        out=matrix(TensorRole.ATTENTION_OUT),
        gate_DE=plain(TensorRole.GATE),
    )


def load_experts(
    checkpoint: Checkpoint,
    layer: int,
    expert_ids: Sequence[int] | None = None,
    place: Place = jnp.asarray,
) -> ExpertParams:
    """Experts of one layer, all or the given ones, stacked in the given order."""

    def stack(role: TensorRole) -> QuantizedMatrix:
        if expert_ids is None:
            weight, scales = checkpoint.quantized(checkpoint.find(role, layer))
        else:
            slices = [checkpoint.expert(layer, role, expert_id) for expert_id in expert_ids]
            weight, scales = (np.stack(parts) for parts in zip(*slices, strict=True))
        return QuantizedMatrix(weight=place(weight), scales=place(scales))

    return ExpertParams(
        gate_proj=stack(TensorRole.EXPERT_LINEAR),
        up_proj=stack(TensorRole.EXPERT_LINEAR_V),
        down_proj=stack(TensorRole.EXPERT_LINEAR_1),
    )
