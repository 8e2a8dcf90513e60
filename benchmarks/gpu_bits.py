"""Finds the numbers of rows with which a row has the same bits, for each kernel and mode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from milliways.benchmarks.gpu_workload import Layer, Workload, make_batch, make_cache
from milliways.model.config import ModelConfig
from milliways.model.decoder import Decoder
from milliways.model.kv_cache import LayerCache, StepBatch
from milliways.model.ops.gpu import GpuOps
from milliways.model.params import AttentionParams, ExpertParams

# Groups of numbers of rows. Those of one group give the first row the same bits.
Classes = list[list[int]]


class Rows(NamedTuple):
    """Rows for every kernel: the first tokens of one sequence."""

    hidden_TD: jax.Array
    query_THK: jax.Array
    expert_ids_TA: jax.Array
    batch: StepBatch


class Held(NamedTuple):
    """Inputs that do not depend on the number of rows.

    They are arguments of the jitted functions, so that the weights are not compiled as constants.
    """

    attention: AttentionParams
    experts: ExpertParams
    cache: LayerCache
    visible_NP: jax.Array


def bit_classes(
    ops: GpuOps, config: ModelConfig, layer: Layer, sizes: list[int]
) -> dict[str, Classes]:
    """Runs growing numbers of the same rows through each kernel and a whole layer."""
    workload = Workload(num_tokens=max(sizes), is_prefill=True)
    cache = make_cache(config, workload)
    visible_NP = jnp.ones(cache.keys_NPRK.shape[:2], jnp.bool)
    held = Held(layer.attention, layer.experts, cache, visible_NP)
    rows = _make_rows(config, workload)
    classes: dict[str, Classes] = {}
    for name, kernel in _kernels(ops, config, last_position=max(sizes) - 1).items():
        compiled = jax.jit(kernel)
        by_bits: dict[bytes, list[int]] = {}
        for size in sizes:
            results = jax.tree.leaves(compiled(held, _first(rows, size)))
            bits = b"".join(np.asarray(result[0]).tobytes() for result in results)
            by_bits.setdefault(bits, []).append(size)
        classes[name] = list(by_bits.values())
    return classes


def _kernels(
    ops: GpuOps, config: ModelConfig, last_position: int
) -> dict[str, Callable[[Held, Rows], Any]]:
    decoder = Decoder(config=config, dtype=jnp.dtype(jnp.bfloat16), ops=ops)

    def attend(held: Held, rows: Rows) -> jax.Array:
        # Each row attends to the whole cache, so that there are many values to sum.
        return ops.attention(
            rows.query_THK,
            held.cache.keys_NPRK,
            held.cache.values_NPRK,
            held.visible_NP,
            rows.batch.block_tables_BM[rows.batch.slots_T],
            jnp.full_like(rows.batch.positions_T, last_position),
            config.attn_output_multiplier,
        )

    def whole_layer(held: Held, rows: Rows) -> jax.Array:
        result = decoder.attention_half(
            held.attention, rows.hidden_TD, rows.batch, held.cache, held.visible_NP
        )
        outputs = decoder.expert_half(held.experts, result.expert_input_TD, result.expert_ids_TA)
        return decoder.combine(held.attention, result.hidden_TD, outputs, result.gate_weights_TA)

    return {
        "rms_norm": lambda held, rows: ops.rms_norm(rows.hidden_TD, held.attention.expert_norm_D),
        "linear": lambda held, rows: ops.linear(
            rows.hidden_TD.astype(jnp.bfloat16), held.attention.query
        ),
        "gate": lambda held, rows: ops.gate(
            rows.hidden_TD, held.attention.gate_DE, config.num_selected_experts
        ),
        "experts": lambda held, rows: ops.expert_ffn(
            rows.hidden_TD.astype(jnp.bfloat16), rows.expert_ids_TA, held.experts
        ),
        "attention": attend,
        "layer": whole_layer,
    }


def _make_rows(config: ModelConfig, workload: Workload) -> Rows:
    count = workload.num_tokens
    return Rows(
        hidden_TD=jax.random.normal(jax.random.key(4), (count, config.emb_size)),
        query_THK=jax.random.normal(
            jax.random.key(5), (count, config.num_q_heads, config.key_size), jnp.bfloat16
        ),
        expert_ids_TA=jax.random.randint(
            jax.random.key(6), (count, config.num_selected_experts), 0, config.num_experts
        ),
        batch=make_batch(workload),
    )


def _first(rows: Rows, size: int) -> Rows:
    batch = rows.batch
    return Rows(
        hidden_TD=rows.hidden_TD[:size],
        query_THK=rows.query_THK[:size],
        expert_ids_TA=rows.expert_ids_TA[:size],
        batch=StepBatch(
            token_ids_T=batch.token_ids_T[:size],
            positions_T=batch.positions_T[:size],
            slots_T=batch.slots_T[:size],
            block_tables_BM=batch.block_tables_BM,
            logits_rows_W=batch.logits_rows_W,
        ),
    )
