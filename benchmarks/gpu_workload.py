"""Layers with random weights, batches for them, and the least work that a batch needs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from milliways.model.config import ModelConfig
from milliways.model.kv_cache import LayerCache, StepBatch
from milliways.model.ops.gpu_matmul import plain
from milliways.model.params import AttentionParams, ExpertParams, QuantizedMatrix

BLOCK_SIZE = 16
# The number of scale rows of the matrices that the release quantised in row blocks.
NUM_SCALE_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A step: one token each of `num_tokens` sequences, or a prefill of one sequence."""

    num_tokens: int
    is_prefill: bool
    # The number of positions that each decoding sequence already has in the cache.
    context: int = 0

    @property
    def name(self) -> str:
        return f"{'prefill' if self.is_prefill else 'batch'} {self.num_tokens}"

    @property
    def blocks_per_sequence(self) -> int:
        return -(-(self.num_tokens if self.is_prefill else self.context + 1) // BLOCK_SIZE)

    @property
    def num_blocks(self) -> int:
        return self.blocks_per_sequence * (1 if self.is_prefill else self.num_tokens)

    @property
    def num_attended(self) -> int:
        """The number of pairs of query and key positions."""
        if self.is_prefill:
            return self.num_tokens * (self.num_tokens + 1) // 2
        return self.num_tokens * (self.context + 1)


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters of one layer."""

    attention: AttentionParams
    experts: ExpertParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least work of a half of a layer: reads of weights and keys, once, and multiplications.

    Activations are not counted: they are small, and a better program could keep them on the chip.
    """

    num_bytes: float
    num_flops: float


def make_layer(config: ModelConfig, seed: int) -> Layer:
    """A layer with random int8 weights, which the device makes one expert at a time."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    width, ffn, num_experts = config.emb_size, config.ffn_size, config.num_experts

    def matrix(*shape: int, scale_rows: int = 1) -> QuantizedMatrix:
        return _random_matrix(next(keys), shape, scale_rows)

    def norm() -> jax.Array:
        return jnp.ones(width, jnp.float32)

    return Layer(
        AttentionParams(
            attention_norm_D=norm(),
            attention_post_norm_D=norm(),
            expert_norm_D=norm(),
            expert_post_norm_D=norm(),
            query=matrix(width, config.q_size),
            key=matrix(width, config.kv_size),
            value=matrix(width, config.kv_size),
            out=matrix(config.q_size, width, scale_rows=NUM_SCALE_ROWS),
            gate_DE=jax.random.normal(next(keys), (width, num_experts)) / width**0.5,
        ),
        ExpertParams(
            gate_proj=matrix(num_experts, width, ffn),
            up_proj=matrix(num_experts, width, ffn),
            down_proj=matrix(num_experts, ffn, width, scale_rows=NUM_SCALE_ROWS),
        ),
    )


def _random_matrix(key: jax.Array, shape: tuple[int, ...], scale_rows: int) -> QuantizedMatrix:
    *stack, num_in, num_out = shape

    def one(key: jax.Array) -> jax.Array:
        bits = jax.random.bits(key, (num_in, num_out), jnp.uint8)
        return lax.bitcast_convert_type(bits, jnp.int8)

    make = jax.jit(lambda key: lax.map(one, jax.random.split(key, stack[0])) if stack else one(key))
    scales = jnp.full((*stack, scale_rows, num_out), 1 / (73 * num_in**0.5), jnp.bfloat16)
    return QuantizedMatrix(weight=make(key), scales=scales)


def make_batch(workload: Workload) -> StepBatch:
    """The batch of a workload. Its token ids do not matter: a layer begins with hidden states."""
    count, rows = workload.num_tokens, np.arange(workload.num_tokens, dtype=np.int32)
    tables = np.arange(workload.num_blocks, dtype=np.int32)
    return StepBatch(
        token_ids_T=jnp.ones(count, jnp.int32),
        positions_T=jnp.asarray(
            rows if workload.is_prefill else np.full(count, workload.context, np.int32)
        ),
        slots_T=jnp.asarray(np.zeros_like(rows) if workload.is_prefill else rows),
        block_tables_BM=jnp.asarray(tables.reshape(-1, workload.blocks_per_sequence)),
        logits_rows_W=jnp.zeros(1, jnp.int32),
    )


def make_cache(config: ModelConfig, workload: Workload) -> LayerCache:
    """Random keys and values in every block of the workload's sequences."""
    shape = (workload.num_blocks, BLOCK_SIZE, config.num_kv_heads, config.key_size)
    keys, values = (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in (1, 2))
    return LayerCache(keys_NPRK=keys, values_NPRK=values)


def attention_work(config: ModelConfig, layer: Layer, workload: Workload) -> Work:
    """The work of projections, norms and gate, and of each sequence's keys and values, once."""
    params = layer.attention
    projections = (params.query, params.key, params.value, params.out)
    num_weights = sum(plain(matrix).weight.size for matrix in projections)
    num_cached = workload.num_blocks * BLOCK_SIZE * 2 * config.kv_size
    return Work(
        num_bytes=tree_bytes(params) + num_cached * jnp.dtype(jnp.bfloat16).itemsize,
        num_flops=2 * workload.num_tokens * (num_weights + params.gate_DE.size)
        + 4 * workload.num_attended * config.q_size,
    )


def expert_work(
    config: ModelConfig, layer: Layer, workload: Workload, num_experts_read: float
) -> Work:
    """The work of reading each chosen expert's weights once, and of each token's experts."""
    share = 1 / config.num_experts
    projections = (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj)
    num_weights = sum(plain(matrix).weight.size for matrix in projections) * share
    return Work(
        num_bytes=tree_bytes(layer.experts) * share * num_experts_read,
        num_flops=2 * workload.num_tokens * config.num_selected_experts * num_weights,
    )


def tree_bytes(tree: object) -> int:
    """The bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
