"""Grok-1's forward pass, as functions that one process or several can compute.

A step is this composition, no matter how many processes compute its parts:

    hidden = embed(tokens)
    for each layer:
        hidden, expert_input, expert_ids, gate_weights, cache = attention_half(hidden, cache)
        outputs = expert_half(expert_input, expert_ids)         # on the workers with the experts
        hidden = combine(hidden, outputs, gate_weights)
    logits = unembed(hidden)

`run_step` composes the parts. They are compiled together as one program, or each as its own.
Source of every formula: xai-org/grok-1, model.py. The numerics are behind `Ops`.

Dtypes: inputs of a matrix product, the KV cache, and messages to another process have the
activation dtype (float32 or bfloat16). Sums, norms, softmax and the residual stream are float32.

Bits: a product that is part of a sum is computed inside `map_tiles` or by `Ops`. So a step rounds
in the same way whether it is compiled as one program or in parts; see `tiles`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from milliways.model.config import ModelConfig
from milliways.model.kv_cache import (
    KVCache,
    LayerCache,
    StepBatch,
    mark_visible,
    token_places,
)
from milliways.model.ops import Ops, PureOps
from milliways.model.ops.interface import AttentionResult as AttentionResult
from milliways.model.ops.interface import HalfSizes
from milliways.model.params import AttentionParams, EndParams, ExpertParams, Matrix, ModelParams
from milliways.model.tiles import map_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The functions of a model. It is hashable, so that it can be a static argument of a jit."""

    config: ModelConfig
    dtype: jnp.dtype
    ops: Ops = field(default_factory=PureOps)

    def embed(self, ends: EndParams, token_ids_T: Int[Array, " T"]) -> Float[Array, "T D"]:
        """The embedding rows times the multiplier, in float32: the start of the residual stream."""
        scale = self.config.embedding_multiplier_scale
        return map_tiles(lambda rows_TD: rows_TD * scale, ends.embedding_VD[token_ids_T])

    def attention_half(
        self,
        params: AttentionParams,
        hidden_TD: Float[Array, "T D"],
        batch: StepBatch,
        cache: LayerCache,
        visible_NP: Array,
    ) -> AttentionResult:
        """Attention with its two norms, the residual sum, then the experts' norm and the gate."""
        if self.ops.halves is not None:
            result = self.ops.halves.attention_half(
                params, hidden_TD, batch, cache, visible_NP, self.half_sizes
            )
            return result._replace(expert_input_TD=result.expert_input_TD.astype(self.dtype))
        attention_input_TD = self.ops.rms_norm(hidden_TD, params.attention_norm_D)
        attended_TD, cache = self.attend(
            params, self._rounded(attention_input_TD), batch, cache, visible_NP
        )
        hidden_TD += self.ops.rms_norm(attended_TD, params.attention_post_norm_D)
        # The gate gets its input before rounding: in bfloat16, near ties then change less often.
        gate_input_TD = self.ops.rms_norm(hidden_TD, params.expert_norm_D)
        expert_ids_TA, gate_weights_TA = self.ops.gate(
            gate_input_TD, params.gate_DE, self.config.num_selected_experts
        )
        # Padding goes to no expert: otherwise weights would be read for nothing.
        expert_ids_TA = jnp.where(batch.positions_T[:, None] >= 0, expert_ids_TA, -1)
        expert_input_TD = self._rounded(gate_input_TD)
        return AttentionResult(hidden_TD, expert_input_TD, expert_ids_TA, gate_weights_TA, cache)

    def attend(
        self,
        params: AttentionParams,
        hidden_TD: Float[Array, "T D"],
        batch: StepBatch,
        cache: LayerCache,
        visible_NP: Array,
    ) -> tuple[Float[Array, "T D"], LayerCache]:
        """Projections, RoPE, writing keys and values to the cache, attention, output projection."""

        def project(matrix: Matrix) -> Array:
            rows = self.ops.linear(hidden_TD, matrix)
            return rows.reshape(rows.shape[0], -1, self.config.key_size)

        positions_T = batch.positions_T
        query_THK = self._rounded(self.ops.rope(project(params.query), positions_T))
        keys_TRK = self._rounded(self.ops.rope(project(params.key), positions_T))
        values_TRK = self._rounded(project(params.value))
        places_T = token_places(batch, *visible_NP.shape)
        cache = LayerCache(
            keys_NPRK=self.ops.write_rows(cache.keys_NPRK, keys_TRK, places_T),
            values_NPRK=self.ops.write_rows(cache.values_NPRK, values_TRK, places_T),
        )
        mixed_THK = self.ops.attention(
            query_THK,
            cache.keys_NPRK,
            cache.values_NPRK,
            visible_NP,
            batch.block_tables_BM[batch.slots_T],
            positions_T,
            self.config.attn_output_multiplier,
        )
        mixed_TK = self._rounded(mixed_THK.reshape(mixed_THK.shape[0], -1))
        return self.ops.linear(mixed_TK, params.out), cache

    def expert_half(
        self,
        params: ExpertParams,
        expert_input_TD: Float[Array, "T D"],
        expert_ids_TA: Int[Array, "T A"],
    ) -> Float[Array, "T A D"]:
        """The outputs of each token's chosen experts, without weights, in the activation dtype.

        An id of an expert that `params` does not hold gives zeros.
        """
        return self._rounded(self.ops.expert_ffn(expert_input_TD, expert_ids_TA, params))

    def combine(
        self,
        params: AttentionParams,
        hidden_TD: Float[Array, "T D"],
        outputs_TAD: Float[Array, "T A D"],
        gate_weights_TA: Float[Array, "T A"],
    ) -> Float[Array, "T D"]:
        """Sums the experts' outputs with their weights, and adds the normed sum to the stream."""
        if self.ops.halves is not None:
            return self.ops.halves.combine(params, hidden_TD, outputs_TAD, gate_weights_TA)
        mixed_TD = self.ops.weigh(outputs_TAD, gate_weights_TA)
        return hidden_TD + self.ops.rms_norm(mixed_TD, params.expert_post_norm_D)

    def unembed(
        self, ends: EndParams, hidden_TD: Float[Array, "T D"], rows_W: Int[Array, " W"]
    ) -> Float[Array, "W V"]:
        """The logits of the wanted rows, in float32: final norm and output head, without a cap."""
        hidden_WD = self.ops.rms_norm(hidden_TD[rows_W], ends.final_norm_D)
        scale = self.config.output_multiplier_scale
        return self.ops.linear(self._rounded(hidden_WD), ends.head, scale)

    def parts(self) -> "DecoderParts":
        """The parts of a step, to be composed as they are, or after each was compiled."""
        return DecoderParts(
            mark_visible=partial(mark_visible, pad_token=self.config.pad_token),
            embed=self.embed,
            attention_half=self.attention_half,
            expert_half=self.expert_half,
            combine=self.combine,
            unembed=self.unembed,
        )

    def step(
        self, params: ModelParams, batch: StepBatch, cache: KVCache
    ) -> tuple[Float[Array, "W V"], KVCache]:
        """Computes a batch with the whole model: logits of the wanted rows, and the new cache."""
        return run_step(self.parts(), params, batch, cache)

    @property
    def half_sizes(self) -> HalfSizes:
        """What kernels of whole halves must know of the model."""
        return HalfSizes(
            num_heads=self.config.num_q_heads,
            key_size=self.config.key_size,
            num_selected=self.config.num_selected_experts,
            logit_scale=self.config.attn_output_multiplier,
        )

    def _rounded(self, array: Array) -> Array:
        """Rounds to the activation dtype, in a way that XLA cannot remove.

        XLA removes a conversion to bfloat16 if the same program converts back to float32. The
        conversion back may be in another process, so whether bits are lost would depend on where
        programs end. XLA never removes `reduce_precision`.
        """
        if array.dtype == jnp.float32 and self.dtype == jnp.bfloat16:
            array = lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        return array.astype(self.dtype)


class DecoderParts(NamedTuple):
    """The functions of a step. The fields have the names of the methods of `Decoder`."""

    mark_visible: Callable[..., Array]
    embed: Callable[..., Array]
    attention_half: Callable[..., AttentionResult]
    expert_half: Callable[..., Array]
    combine: Callable[..., Array]
    unembed: Callable[..., Array]


def run_step(
    parts: DecoderParts, params: ModelParams, batch: StepBatch, cache: KVCache
) -> tuple[Float[Array, "W V"], KVCache]:
    """One step of the whole model."""
    hidden_TD, cache = run_layers(parts, params, batch, cache)
    return _logits(parts, params.ends, hidden_TD, batch), cache


def _logits(parts: DecoderParts, ends: EndParams, hidden_TD: Array, batch: StepBatch) -> Array:
    if batch.logits_rows_W.shape[0]:
        return parts.unembed(ends, hidden_TD, batch.logits_rows_W)
    return jnp.zeros((0, ends.embedding_VD.shape[0]), jnp.float32)


def run_layers(
    parts: DecoderParts, params: ModelParams, batch: StepBatch, cache: KVCache
) -> tuple[Float[Array, "T D"], KVCache]:
    """A step without its logits: the float32 residual stream of all rows after the last layer."""
    visible_NP = parts.mark_visible(cache.visible_NP, batch)
    hidden_TD = parts.embed(params.ends, batch.token_ids_T)
    layer_caches = []
    for attention, experts, layer_cache in zip(
        params.attention_L, params.experts_L, cache.layers_L, strict=True
    ):
        result = parts.attention_half(attention, hidden_TD, batch, layer_cache, visible_NP)
        outputs_TAD = parts.expert_half(experts, result.expert_input_TD, result.expert_ids_TA)
        hidden_TD = parts.combine(attention, result.hidden_TD, outputs_TAD, result.gate_weights_TA)
        layer_caches.append(result.cache)
    return hidden_TD, KVCache(layers_L=tuple(layer_caches), visible_NP=visible_NP)


def run_held_step(
    decoder: Decoder, ends: EndParams, number_1: Array, batch: StepBatch, cache: KVCache
) -> tuple[Float[Array, "W V"], KVCache]:
    """`run_step` with layers that the kernels hold under a number."""
    hidden_TD, cache = run_held_layers(decoder, ends, number_1, batch, cache)
    return _logits(decoder.parts(), ends, hidden_TD, batch), cache


def run_held_layers(
    decoder: Decoder, ends: EndParams, number_1: Array, batch: StepBatch, cache: KVCache
) -> tuple[Float[Array, "T D"], KVCache]:
    """`run_layers` with layers that the kernels hold under a number."""
    assert decoder.ops.halves is not None
    parts = decoder.parts()
    visible_NP = parts.mark_visible(cache.visible_NP, batch)
    hidden_TD, layers_L = decoder.ops.halves.pass_layers(
        number_1, parts.embed(ends, batch.token_ids_T), batch, cache.layers_L, visible_NP
    )
    return hidden_TD, KVCache(layers_L=layers_L, visible_NP=visible_NP)
