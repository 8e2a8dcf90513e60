"""The parameters of the forward pass: Flax dataclasses, divided as a cluster divides them.

A worker holds `AttentionParams` of some layers, `ExpertParams` of some experts of some layers, or
both. The first and the last worker of a chain hold `EndParams`. A `Loader` copies each array once,
from the mapped file to its place. `MappedLoader` leaves experts in the files. What a shard does not
need is not read.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from milliways.model.activations import Activations, quantise_head
from milliways.model.checkpoint import TensorRole, TensorSource


@struct.dataclass
class QuantizedMatrix:
    """int8 weights [in, out] with scale rows: W[g * K/G + r, n] = weight * scales[g, n].

    In a stack of matrices (experts), both arrays have leading axes. The output head may be int16.
    """

    weight: Int[Array, "*stack K N"]
    scales: Float[Array, "*stack G N"]

    @property
    def num_scale_rows(self) -> int:
        return self.scales.shape[-2]

    @property
    def stack_size(self) -> int:
        return self.weight.shape[0]


@struct.dataclass
class PackedMatrix:
    """The same matrix in panels, the form that CPU kernels read (model/ops/native/kernels.h)."""

    panels: UInt8[Array, "*stack num_panels panel_bytes"]
    scales: Float[Array, "*stack G padded_N"]
    kind: int = struct.field(pytree_node=False)
    num_in: int = struct.field(pytree_node=False)
    num_out: int = struct.field(pytree_node=False)

    @property
    def stack_size(self) -> int:
        return self.panels.shape[0]


@struct.dataclass
class MappedMatrix:
    """A stack of int8 matrices that stay in their mapped files.

    `regions` has the numbers under which the kernels know the mapped bytes of each matrix.
    """

    regions: Int[Array, " stack"]
    scales: Float[Array, "stack G padded_N"]
    kind: int = struct.field(pytree_node=False)
    num_in: int = struct.field(pytree_node=False)
    num_out: int = struct.field(pytree_node=False)

    @property
    def stack_size(self) -> int:
        return self.regions.shape[0]


Matrix = QuantizedMatrix | PackedMatrix | MappedMatrix
HostMatrix = tuple[np.ndarray, np.ndarray]


@struct.dataclass
class AttentionParams:
    """The attention half of one layer: projections, both attention norms, both expert norms, gate.

    The expert norms belong to it because the process with the residual stream combines outputs.
    """

    attention_norm_D: Float[Array, " D"]
    attention_post_norm_D: Float[Array, " D"]
    expert_norm_D: Float[Array, " D"]
    expert_post_norm_D: Float[Array, " D"]
    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    gate_DE: Float[Array, "D E"]


@struct.dataclass
class ExpertParams:
    """Experts of one layer, stacked on the first axis: gate [E,D,F], up [E,D,F], down [E,F,D]."""

    gate_proj: Matrix
    up_proj: Matrix
    down_proj: Matrix

    @property
    def num_experts(self) -> int:
        return self.gate_proj.stack_size


@struct.dataclass
class EndParams:
    """What the first and the last shard of a chain need: the tied embedding and the final norm.

    The embedding table stays in float32, as released, even if activations are bfloat16. Rounding
    the table, as the reference does, would change more gate decisions than any other rounding of
    the forward pass. `head` is the same table, transposed and rounded, for the logits.
    """

    embedding_VD: Float[Array, "V D"]
    head: Matrix
    final_norm_D: Float[Array, " D"]


@struct.dataclass
class ModelParams:
    """A whole model in one process."""

    ends: EndParams
    attention_L: tuple[AttentionParams, ...]
    experts_L: tuple[ExpertParams, ...]


class Loader(Protocol):
    """Puts host arrays where the kernels need them, in the form that they need."""

    @property
    def activations(self) -> Activations: ...

    @property
    def maps_experts(self) -> bool:
        """Whether `stack` keeps the given arrays in use; otherwise it copies them."""
        ...

    def array(self, host: np.ndarray) -> jax.Array:
        """A plain array."""
        ...

    def matrix(self, weight: np.ndarray, scales: np.ndarray) -> Matrix:
        """One matrix [K, N] with its scale rows [G, N]."""
        ...

    def stack(self, parts: Iterable[HostMatrix], count: int) -> Matrix:
        """`count` matrices of the same shape, at least one, stacked in the given order."""
        ...


class DeviceLoader:
    """Keeps arrays as they are."""

    maps_experts = False

    def __init__(self, activations: Activations = Activations.EXACT) -> None:
        self.activations = activations

    def array(self, host: np.ndarray) -> jax.Array:
        return jnp.asarray(host)

    def matrix(self, weight: np.ndarray, scales: np.ndarray) -> QuantizedMatrix:
        return QuantizedMatrix(weight=self.array(weight), scales=self.array(scales))

    def stack(self, parts: Iterable[HostMatrix], count: int) -> QuantizedMatrix:
        weights, scales = zip(*parts, strict=True)
        return self.matrix(np.stack(weights), np.stack(scales))


def load_model(source: TensorSource, loader: Loader) -> ModelParams:
    """All parameters of a model."""
    layers = range(source.config.num_layers)
    return ModelParams(
        ends=load_ends(source, loader),
        attention_L=tuple(load_attention(source, layer, loader) for layer in layers),
        experts_L=tuple(load_experts(source, layer, loader) for layer in layers),
    )


def load_ends(source: TensorSource, loader: Loader) -> EndParams:
    """Embedding, output head and final norm."""
    embedding_VD = source.plain(source.find(TensorRole.EMBEDDING))
    ends = EndParams(
        embedding_VD=loader.array(embedding_VD),
        head=loader.matrix(*quantise_head(embedding_VD, loader.activations)),
        final_norm_D=loader.array(source.plain(source.find(TensorRole.FINAL_NORM))),
    )
    source.release_maps()
    return ends


def load_attention(source: TensorSource, layer: int, loader: Loader) -> AttentionParams:
    """The attention half of one layer."""

    def plain(role: TensorRole) -> jax.Array:
        return loader.array(source.plain(source.find(role, layer)))

    def matrix(role: TensorRole) -> Matrix:
        return loader.matrix(*source.quantized(source.find(role, layer)))

    attention = AttentionParams(
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
    source.release_maps()
    return attention


def load_experts(
    source: TensorSource,
    layer: int,
    loader: Loader,
    expert_ids: Sequence[int] | None = None,
) -> ExpertParams:
    """Experts of one layer, all or the given ones, stacked in the given order."""
    ids = range(source.config.num_experts) if expert_ids is None else expert_ids

    def stack(role: TensorRole) -> Matrix:
        if not loader.maps_experts:
            source.expect(layer, role, ids)
        # One after the other, so that no two experts are in memory twice.
        parts = (source.expert(layer, role, i, stays_mapped=loader.maps_experts) for i in ids)
        return loader.stack(parts, len(ids))

    experts = ExpertParams(
        gate_proj=stack(TensorRole.EXPERT_LINEAR),
        up_proj=stack(TensorRole.EXPERT_LINEAR_V),
        down_proj=stack(TensorRole.EXPERT_LINEAR_1),
    )
    source.release_maps()
    return experts
