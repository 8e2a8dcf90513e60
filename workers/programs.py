"""The compiled programs of an attention shard that combine several parts of a decoder.

In a program of several layers, the parts stay jitted: then they are traced once, not once for each
layer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from milliways.model.decoder import AttentionResult, Decoder
from milliways.model.kv_cache import LayerCache, StepBatch, read_block, write_block
from milliways.model.ops.native import exchange
from milliways.model.params import AttentionParams, ExpertParams
from milliways.model.runner import jitted_parts


@cache
def combine_and_attend(decoder: Decoder) -> Callable[..., AttentionResult]:
    """From the outputs of one layer's experts to the input of the next layer's, as one program."""

    def go_on(
        before: AttentionParams,
        params: AttentionParams,
        hidden_TD: jax.Array,
        outputs_TAD: jax.Array,
        gate_weights_TA: jax.Array,
        step: StepBatch,
        cache: LayerCache,
        visible_NP: jax.Array,
    ) -> AttentionResult:
        hidden_TD = decoder.combine(before, hidden_TD, outputs_TAD, gate_weights_TA)
        return decoder.attention_half(params, hidden_TD, step, cache, visible_NP)

    return jax.jit(go_on, donate_argnums=(6,))


@cache
def pass_through(decoder: Decoder) -> Callable[..., tuple[jax.Array, tuple[LayerCache, ...]]]:
    """Several layers with all their experts, as one program."""
    parts = jitted_parts(decoder)

    def run(
        attention_L: tuple[AttentionParams, ...],
        experts_L: tuple[ExpertParams, ...],
        hidden_TD: jax.Array,
        step: StepBatch,
        caches_L: tuple[LayerCache, ...],
        visible_NP: jax.Array,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        kept: list[LayerCache] = []
        for params, experts, layer_cache in zip(attention_L, experts_L, caches_L, strict=True):
            result = parts.attention_half(params, hidden_TD, step, layer_cache, visible_NP)
            outputs_TAD = parts.expert_half(experts, result.expert_input_TD, result.expert_ids_TA)
            hidden_TD = parts.combine(params, result.hidden_TD, outputs_TAD, result.gate_weights_TA)
            kept.append(result.cache)
        return hidden_TD, tuple(kept)

    return jax.jit(run, donate_argnums=(4,))


@cache
def pass_and_exchange(
    decoder: Decoder,
) -> Callable[..., tuple[jax.Array, tuple[LayerCache, ...]]]:
    """Several layers whose experts may be anywhere, as one program: an exchange asks for them."""
    parts = jitted_parts(decoder)

    def run(
        attention_L: tuple[AttentionParams, ...],
        hidden_TD: jax.Array,
        step: StepBatch,
        caches_L: tuple[LayerCache, ...],
        visible_NP: jax.Array,
        where_2: jax.Array,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        kept: list[LayerCache] = []
        for layer, (params, layer_cache) in enumerate(zip(attention_L, caches_L, strict=True)):
            result = parts.attention_half(params, hidden_TD, step, layer_cache, visible_NP)
            outputs_TAD = exchange(result.expert_input_TD, result.expert_ids_TA, where_2, layer)
            hidden_TD = parts.combine(params, result.hidden_TD, outputs_TAD, result.gate_weights_TA)
            kept.append(result.cache)
        return hidden_TD, tuple(kept)

    return jax.jit(run, donate_argnums=(3,))


@cache
def block_programs() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Reads a block of all layers, and writes one in place."""
    return jax.jit(read_block), jax.jit(write_block, donate_argnums=(0,))


@cache
def attend_and_deal(
    decoder: Decoder,
) -> Callable[..., tuple[AttentionResult, tuple[jax.Array, ...]]]:
    """The attention half, and the place of each wanted expert in its stack, as one program."""
    parts = jitted_parts(decoder)

    def attend(
        params: AttentionParams,
        hidden_TD: jax.Array,
        step: StepBatch,
        cache: LayerCache,
        visible_NP: jax.Array,
        tables_GE: jax.Array,
    ) -> tuple[AttentionResult, tuple[jax.Array, ...]]:
        result = parts.attention_half(params, hidden_TD, step, cache, visible_NP)
        return result, tuple(table_E[result.expert_ids_TA] for table_E in tables_GE)

    return jax.jit(attend, donate_argnums=(3,))


@cache
def gather_and_combine(decoder: Decoder) -> Callable[..., jax.Array]:
    """Takes each output from the stack that computed it, and combines them, as one program."""
    parts = jitted_parts(decoder)

    def gather(
        params: AttentionParams,
        hidden_TD: jax.Array,
        outputs_GTAD: tuple[jax.Array, ...],
        places_GTA: tuple[jax.Array, ...],
        gate_weights_TA: jax.Array,
    ) -> jax.Array:
        # Chosen and not added: a sum with zeros would make 0.0 of -0.0.
        gathered_TAD = jnp.zeros_like(outputs_GTAD[0])
        for outputs_TAD, places_TA in zip(outputs_GTAD, places_GTA, strict=True):
            gathered_TAD = jnp.where(places_TA[..., None] >= 0, outputs_TAD, gathered_TAD)
        return parts.combine(params, hidden_TD, gathered_TAD, gate_weights_TA)

    return jax.jit(gather)
