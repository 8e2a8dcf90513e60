"""The experts on a GPU: assignments are sorted by expert into tiles, and two kernels run over them.

An assignment is a pair of a token and one of its chosen experts.

1. The assignments of each expert fill tiles of a fixed number of rows. The last tile is padded.
2. One kernel computes gate, up and GeGLU, another the projection down. A tile reads the weights of
   its own expert, so the weights of an expert that no token chose are never read.
3. The result of each assignment is read from its place. If another shard has the expert, it is 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from milliways.model.ops.gpu_matmul import geglu, grouped_matmul, plain
from milliways.model.ops.gpu_tiles import MatmulTile
from milliways.model.params import ExpertParams


class Grouping(NamedTuple):
    """The order of the sorted rows.

    tokens_C          the token at each place; any token in padding
    tile_experts_I    the expert of each tile; -1 for tiles that this batch does not need
    places_TA         the place of each assignment; 0 if another shard has its expert
    is_held_TA        whether this shard has the expert of the assignment
    """

    tokens_C: jax.Array
    tile_experts_I: jax.Array
    places_TA: jax.Array
    is_held_TA: jax.Array


def expert_ffn(
    hidden_TD: Float[Array, "T D"],
    expert_ids_TA: Int[Array, "T A"],
    experts: ExpertParams,
    *,
    tile: MatmulTile,
    interpret: bool,
) -> Float[Array, "T A D"]:
    """down(gelu(x @ gate) * (x @ up)) of each token's chosen experts, float32.

    The array between the two kernels has the activation dtype, like every input of a product.
    """
    grouping = group_by_expert(expert_ids_TA, experts.num_experts, tile.rows)
    rows_CD = hidden_TD[grouping.tokens_C]
    gate, up = plain(experts.gate_proj), plain(experts.up_proj)
    if gate.num_scale_rows == up.num_scale_rows:
        hidden_CF = grouped_matmul(
            rows_CD,
            grouping.tile_experts_I,
            (gate, up),
            tile=tile,
            epilogue=geglu,
            out_dtype=hidden_TD.dtype,
            interpret=interpret,
        )
    else:
        # No released model has different numbers here. This takes two products, and XLA's GeGLU.
        gate_CF, up_CF = (
            grouped_matmul(
                rows_CD, grouping.tile_experts_I, (matrix,), tile=tile, interpret=interpret
            )
            for matrix in (gate, up)
        )
        hidden_CF = geglu(gate_CF, up_CF).astype(hidden_TD.dtype)
    outputs_CD = grouped_matmul(
        hidden_CF,
        grouping.tile_experts_I,
        (plain(experts.down_proj),),
        tile=tile,
        interpret=interpret,
    )
    return jnp.where(grouping.is_held_TA[:, :, None], outputs_CD[grouping.places_TA], 0.0)


def group_by_expert(expert_ids_TA: Int[Array, "T A"], num_experts: int, tile_rows: int) -> Grouping:
    """Puts assignments into tiles of `tile_rows`, by expert, then in the order of the batch."""
    num_tokens, num_selected = expert_ids_TA.shape
    num_tiles = max_num_tiles(num_tokens * num_selected, num_experts, tile_rows)
    is_held_TA = (expert_ids_TA >= 0) & (expert_ids_TA < num_experts)

    ids_J = jnp.where(is_held_TA, expert_ids_TA, num_experts).reshape(-1)
    is_mine_JE = ids_J[:, None] == jnp.arange(num_experts)[None, :]
    counts_JE = jnp.cumsum(is_mine_JE.astype(jnp.int32), axis=0)
    num_tiles_E = (counts_JE[-1] + tile_rows - 1) // tile_rows
    tile_ends_E = jnp.cumsum(num_tiles_E)
    first_places_E = (tile_ends_E - num_tiles_E) * tile_rows
    places_J = jnp.sum(jnp.where(is_mine_JE, first_places_E[None, :] + counts_JE - 1, 0), axis=1)

    tile_experts_I = jnp.sum(jnp.arange(num_tiles)[:, None] >= tile_ends_E[None, :], axis=1)
    tokens_J = jnp.arange(num_tokens * num_selected) // num_selected
    kept_J = jnp.where(ids_J < num_experts, places_J, num_tiles * tile_rows)
    tokens_C = jnp.zeros(num_tiles * tile_rows, jnp.int32).at[kept_J].set(tokens_J, mode="drop")
    return Grouping(
        tokens_C=tokens_C,
        tile_experts_I=jnp.where(tile_experts_I < num_experts, tile_experts_I, -1),
        places_TA=places_J.reshape(num_tokens, num_selected),
        is_held_TA=is_held_TA,
    )


def max_num_tiles(num_assignments: int, num_experts: int, tile_rows: int) -> int:
    """The number of tiles that is enough for any choice of experts.

    In the worst case, each chosen expert has one tile with only one row.
    """
    num_padding = min(num_experts, num_assignments) * (tile_rows - 1)
    return max(1, (num_assignments + num_padding) // tile_rows)
