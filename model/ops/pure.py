"""The kernels in plain JAX: they run everywhere, are slow, and give the same bits in every batch.

XLA chooses the order of a reduction by its shape. So a row that is summed in a batch of 3 can
differ in the last bit from the same row in a batch of 4. Every reduction here runs over tiles of
exactly `TILE` rows, and the last one is padded. Attention sums over chunks of `CHUNK` positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from milliways.model.activations import LEAST_BLOCK, QUANT_BLOCK, Activations
from milliways.model.kv_cache import scatter_rows
from milliways.model.ops.gate import choose_experts
from milliways.model.ops.interface import HalfOps
from milliways.model.params import ExpertParams, Matrix, QuantizedMatrix
from milliways.model.sampling import RowSummary, gumbel_noise, summarize_rows
from milliways.model.tiles import TILE, map_tiles

CHUNK = 64
ROPE_BASE = 10000.0
RMS_EPSILON = 1e-5
LOGIT_CAP = 30.0
# Finite, as in the reference, so that the difference of two masked logits is not NaN.
MASKED = -1e30


@dataclass(frozen=True, slots=True)
class PureOps:
    """`Ops` with XLA alone; `interface` says what each method computes."""

    activations: Activations = Activations.EXACT

    @property
    def min_rows(self) -> int:
        return TILE

    @property
    def fuses_steps(self) -> bool:
        return False

    @property
    def halves(self) -> HalfOps | None:
        return None

    def rms_norm(
        self, hidden_TD: Float[Array, "T D"], scale_D: Float[Array, " D"]
    ) -> Float[Array, "T D"]:
        return map_tiles(partial(_rms_norm_tile, scale_D=scale_D), hidden_TD)

    def linear(
        self, rows_TK: Float[Array, "T K"], matrix: Matrix, multiplier: float = 1.0
    ) -> Float[Array, "T N"]:
        return map_tiles(partial(self._linear_tile, matrix=_plain(matrix)), rows_TK) * multiplier

    def rope(
        self, heads_THK: Float[Array, "T H K"], positions_T: Int[Array, " T"]
    ) -> Float[Array, "T H K"]:
        return map_tiles(rope_rows, heads_THK, positions_T)

    def weigh(
        self, outputs_TAD: Float[Array, "T A D"], gate_weights_TA: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        return map_tiles(weigh_rows, outputs_TAD, gate_weights_TA)

    def gate(
        self, hidden_TD: Float[Array, "T D"], gate_DE: Float[Array, "D E"], num_selected: int
    ) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
        tile = partial(choose_experts, gate_DE=gate_DE, num_selected=num_selected)
        return map_tiles(tile, hidden_TD)

    def expert_ffn(
        self,
        hidden_TD: Float[Array, "T D"],
        expert_ids_TA: Int[Array, "T A"],
        experts: ExpertParams,
    ) -> Float[Array, "T A D"]:
        return _expert_ffn(hidden_TD, expert_ids_TA, experts, self._expert_tile)

    def gumbel(self, key_2: UInt32[Array, " 2"], num_places: int) -> Float[Array, " V"]:
        return gumbel_noise(key_2, num_places)

    def summarize_rows(self, logits_BV: Float[Array, "B V"]) -> RowSummary:
        return summarize_rows(logits_BV)

    def write_rows(
        self,
        blocks_NPRK: Float[Array, "N P R K"],
        rows_TRK: Float[Array, "T R K"],
        places_T: Int[Array, " T"],
    ) -> Float[Array, "N P R K"]:
        return scatter_rows(blocks_NPRK, rows_TRK, places_T)

    def attention(
        self,
        query_THK: Float[Array, "T H K"],
        keys_NPRK: Float[Array, "N P R K"],
        values_NPRK: Float[Array, "N P R K"],
        visible_NP: Bool[Array, "N P"],
        block_tables_TM: Int[Array, "T M"],
        positions_T: Int[Array, " T"],
        logit_scale: float,
    ) -> Float[Array, "T H K"]:
        cache = _Cache(keys_NPRK, values_NPRK, visible_NP)
        rows = _Rows(query_THK, block_tables_TM, num_keys_T=positions_T + 1)
        return map_tiles(partial(_attention_tile, cache=cache, logit_scale=logit_scale), rows)

    def _linear_tile(self, rows_TK: Array, matrix: QuantizedMatrix) -> Array:
        is_exact = self.activations is Activations.EXACT
        return (_exact_tile if is_exact else _int8_tile)(rows_TK, matrix)

    def _expert_tile(self, hidden_TD: Array, expert: ExpertParams) -> Array:
        gate_TF = self._linear_tile(hidden_TD, _plain(expert.gate_proj))
        up_TF = self._linear_tile(hidden_TD, _plain(expert.up_proj))
        hidden_TF = jax.nn.gelu(gate_TF, approximate=True) * up_TF
        return self._linear_tile(hidden_TF, _plain(expert.down_proj))


class _Cache(NamedTuple):
    """One layer's KV blocks."""

    keys_NPRK: Array
    values_NPRK: Array
    visible_NP: Array


class _Rows(NamedTuple):
    """Rows of queries. `num_keys_T` is 0 for padding, which sees no key."""

    query_THK: Array
    block_tables_TM: Array
    num_keys_T: Array


def _rms_norm_tile(hidden_TD: Array, scale_D: Array) -> Array:
    hidden32_TD = hidden_TD.astype(jnp.float32)
    mean_square_T1 = jnp.mean(jnp.square(hidden32_TD), axis=-1, keepdims=True)
    normed_TD = hidden32_TD * lax.rsqrt(mean_square_T1 + RMS_EPSILON)
    return normed_TD * scale_D[None, :]


def _plain(matrix: Matrix) -> QuantizedMatrix:
    assert isinstance(matrix, QuantizedMatrix), "packed for the CPU kernels, not for XLA"
    return matrix


def _exact_tile(rows_TK: Array, matrix: QuantizedMatrix) -> Array:
    """Sums the inputs of each scale row, scales the sums, then adds them.

    An int8 weight is exact in float32 and in bfloat16, so nothing is rounded before the sum.
    """
    num_in, num_out = matrix.weight.shape
    num_groups = matrix.num_scale_rows
    if matrix.weight.dtype != jnp.int8:
        rows_TK = rows_TK.astype(jnp.float32)
    weight_GKN = matrix.weight.astype(rows_TK.dtype).reshape(num_groups, -1, num_out)
    rows_TGK = rows_TK.reshape(TILE, num_groups, num_in // num_groups)
    parts_GTN = _dot("tgk,gkn->gtn", rows_TGK, weight_GKN)
    return jnp.sum(parts_GTN * matrix.scales.astype(jnp.float32)[:, None, :], axis=0)


def _int8_tile(rows_TK: Array, matrix: QuantizedMatrix) -> Array:
    """Like `_exact_tile`, but first rounds the inputs of each row to int8, in blocks.

    A sum is a whole number of at most 32 * 127 * 128, which is exact in float32.
    """
    num_in, num_out = matrix.weight.shape
    num_groups = matrix.num_scale_rows
    padding = -(num_in // num_groups) % QUANT_BLOCK
    rows_TGK = rows_TK.astype(jnp.float32).reshape(TILE, num_groups, -1)
    rows_TGK = jnp.pad(rows_TGK, ((0, 0), (0, 0), (0, padding)))
    blocks_TQK = rows_TGK.reshape(TILE, -1, QUANT_BLOCK)
    weight_GKN = matrix.weight.astype(jnp.float32).reshape(num_groups, -1, num_out)
    weight_GKN = jnp.pad(weight_GKN, ((0, 0), (0, padding), (0, 0)))
    whole_TQK, scale_TQ = _round_blocks(blocks_TQK)
    # One batch axis: with two, XLA on CPU (jax 0.10.2) reads uninitialised memory.
    parts_QTN = _dot("tqk,qkn->qtn", whole_TQK, weight_GKN.reshape(-1, QUANT_BLOCK, num_out))
    scaled_QTN = parts_QTN * scale_TQ.T[:, :, None]
    sums_GTN = jnp.sum(scaled_QTN.reshape(num_groups, -1, TILE, num_out), axis=1)
    return jnp.sum(sums_GTN * matrix.scales.astype(jnp.float32)[:, None, :], axis=0)


def _round_blocks(blocks_TQK: Array) -> tuple[Array, Array]:
    """Rounds blocks to whole numbers of at most 127; also returns the scale of each block.

    A NaN or an infinity makes the scale of its block NaN. The scale is 0 if the largest value of
    the block is below `LEAST_BLOCK`.
    """
    top_TQ1 = jnp.max(jnp.abs(blocks_TQK), axis=-1, keepdims=True)
    is_usable_TQ1 = jnp.isfinite(top_TQ1) & (top_TQ1 >= LEAST_BLOCK)
    inverse_TQ1 = jnp.where(is_usable_TQ1, 127.0 / jnp.where(is_usable_TQ1, top_TQ1, 1.0), 0.0)
    scale_TQ1 = jnp.where(is_usable_TQ1, top_TQ1 * jnp.float32(1 / 127), 0.0)
    scale_TQ1 = jnp.where(jnp.isfinite(top_TQ1), scale_TQ1, jnp.nan)
    whole_TQK = jnp.where(is_usable_TQ1, jnp.round(blocks_TQK * inverse_TQ1), 0.0)
    return whole_TQK, scale_TQ1[..., 0]


def rope_rows(
    heads_THK: Float[Array, "T H K"], positions_T: Int[Array, " T"]
) -> Float[Array, "T H K"]:
    """`Ops.rope` of any number of rows at once."""
    cos_TK, sin_TK = (f(rope_angles(positions_T, heads_THK.shape[-1])) for f in (jnp.cos, jnp.sin))
    cos_T1K, sin_T1K = cos_TK[:, None, :], sin_TK[:, None, :]
    low, high = jnp.split(heads_THK, 2, axis=-1)
    return jnp.concatenate(
        [low * cos_T1K - high * sin_T1K, high * cos_T1K + low * sin_T1K], axis=-1
    )


def rope_frequencies(key_size: int) -> np.ndarray:
    """The float32 angle in radians per position, for each of the K/2 pairs of values."""
    half = key_size // 2
    return (ROPE_BASE ** (-np.arange(half) / half)).astype(np.float32)


def rope_angles(positions_T: Array, key_size: int) -> Array:
    """The float32 angles [T, K/2] in radians."""
    return positions_T.astype(jnp.float32)[:, None] * rope_frequencies(key_size)[None, :]


def weigh_rows(
    outputs_TAD: Float[Array, "T A D"], gate_weights_TA: Float[Array, "T A"]
) -> Float[Array, "T D"]:
    """`Ops.weigh` of any number of rows at once."""
    products_TAD = outputs_TAD.astype(jnp.float32) * gate_weights_TA[:, :, None]
    mixed_TD = products_TAD[:, 0]
    for rank in range(1, products_TAD.shape[1]):
        mixed_TD = mixed_TD + products_TAD[:, rank]
    return mixed_TD


def _dot(subscripts: str, left: Array, right: Array) -> Array:
    """Sums in float32. HIGHEST prevents accelerators from rounding float32 operands to TF32."""
    return jnp.einsum(
        subscripts,
        left,
        right,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _expert_ffn(
    hidden_TD: Array,
    expert_ids_TA: Array,
    experts: ExpertParams,
    expert_tile: Callable[[Array, ExpertParams], Array],
) -> Array:
    """Sorts assignments by expert and runs each chosen expert over its group, tile by tile."""
    num_tokens, num_selected = expert_ids_TA.shape
    num_experts, width = experts.num_experts, hidden_TD.shape[1]
    num_assignments = num_tokens * num_selected

    flat_ids = expert_ids_TA.reshape(-1)
    held = (flat_ids >= 0) & (flat_ids < num_experts)
    flat_ids = jnp.where(held, flat_ids, num_experts)
    sort_order = jnp.argsort(flat_ids, stable=True)
    group_sizes_E = jnp.bincount(flat_ids, length=num_experts + 1)[:num_experts]
    group_ends_E = jnp.cumsum(group_sizes_E)

    def run_tile(expert: ExpertParams, start: Array, end: Array, out: Array) -> Array:
        places = start + jnp.arange(TILE)
        assignments = sort_order[jnp.minimum(places, num_assignments - 1)]
        outputs_TD = expert_tile(hidden_TD[assignments // num_selected], expert)
        return out.at[jnp.where(places < end, assignments, num_assignments)].set(
            outputs_TD, mode="drop"
        )

    def run_expert(expert_id: Array, out: Array) -> Array:
        expert = jax.tree.map(lambda stack: stack[expert_id], experts)
        size, end = group_sizes_E[expert_id], group_ends_E[expert_id]
        return lax.fori_loop(
            0,
            (size + TILE - 1) // TILE,
            lambda i, out: run_tile(expert, end - size + i * TILE, end, out),
            out,
        )

    def run_if_chosen(expert_id: Array, out: Array) -> Array:
        # A loop with no iteration is not enough: without the branch, XLA reads idle weights.
        chosen = group_sizes_E[expert_id] > 0
        return lax.cond(chosen, run_expert, lambda _, out: out, expert_id, out)

    out = jnp.zeros((num_assignments, width), jnp.float32)
    out = lax.fori_loop(0, num_experts, run_if_chosen, out)
    return out.reshape(num_tokens, num_selected, width)


def _attention_tile(rows: _Rows, cache: _Cache, logit_scale: float) -> Array:
    """Adds the keys chunk by chunk (online softmax), up to the longest row of the tile.

    A chunk after the end of a row does not change any bit of it: the maximum stays, the correction
    factor is exp(0) = 1, and 0 is added. So the other rows of the tile do not matter.
    """
    num_kv_heads, key_size = cache.keys_NPRK.shape[2:]
    block_size = cache.keys_NPRK.shape[1]
    blocks_per_chunk = max(1, CHUNK // block_size)
    chunk = blocks_per_chunk * block_size
    query_TRGK = rows.query_THK.reshape(TILE, num_kv_heads, -1, key_size)
    tables_TM = jnp.pad(
        rows.block_tables_TM, ((0, 0), (0, -rows.block_tables_TM.shape[1] % blocks_per_chunk))
    )

    def fold(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = state
        blocks = lax.dynamic_slice_in_dim(tables_TM, i * blocks_per_chunk, blocks_per_chunk, 1)
        positions_S = i * chunk + jnp.arange(chunk)
        seen_TS = positions_S[None, :] < rows.num_keys_T[:, None]
        seen_TS &= cache.visible_NP[blocks].reshape(TILE, chunk)
        seen = seen_TS[:, None, None, :]
        keys_TSRK = cache.keys_NPRK[blocks].reshape(TILE, chunk, num_kv_heads, key_size)
        values_TSRK = cache.values_NPRK[blocks].reshape(TILE, chunk, num_kv_heads, key_size)
        # A weight of 0 is not enough: 0 times a NaN that another sequence left is NaN.
        values_TSRK = jnp.where(seen_TS[:, :, None, None], values_TSRK, 0)

        scores = _dot("trgk,tsrk->trgs", query_TRGK, keys_TSRK) * logit_scale
        scores = jnp.where(seen, LOGIT_CAP * jnp.tanh(scores / LOGIT_CAP), MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
        correction = jnp.exp(top - new_top)
        total = total * correction + jnp.sum(weights, axis=-1, keepdims=True)
        mixed = _dot("trgs,tsrk->trgk", weights, values_TSRK.astype(jnp.float32))
        return new_top, total, acc * correction + mixed

    state_shape = (*query_TRGK.shape[:3], 1)
    top, total = jnp.full(state_shape, MASKED, jnp.float32), jnp.zeros(state_shape, jnp.float32)
    num_chunks = (jnp.max(rows.num_keys_T) + chunk - 1) // chunk
    acc = jnp.zeros(query_TRGK.shape, jnp.float32)
    top, total, acc = lax.fori_loop(0, num_chunks, fold, (top, total, acc))
    out = jnp.where(total > 0, acc / jnp.where(total > 0, total, 1.0), 0.0)
    return out.reshape(rows.query_THK.shape)
