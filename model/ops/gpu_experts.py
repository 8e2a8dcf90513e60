"""The experts on a GPU: assignments sorted by expert into whole tiles, two kernels over them.

1. Each expert's assignments fill tiles of a fixed number of rows, the last one padded.
2. One kernel computes gate, up and GeGLU; another the projection down. A tile reads the weights of
   its own expert, so the weights of an expert that nobody chose are never read.
3. Results are picked up by place; assignments to experts held elsewhere get zeros.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from milliways.model.ops.gpu_matmul import geglu, grouped_matmul, plain
from milliways.model.ops.gpu_tiles import MatmulTile
from milliways.model.params import ExpertParams


class Grouping(NamedTuple):
    """Which token stands at which place of the sorted rows.

    tokens_C          token at each place; an arbitrary one at padding
    tile_experts_I    expert of each tile; -1 for tiles that this batch does not need
    places_TA         place of each assignment; 0 where its expert is held elsewhere
    is_held_TA        whether its expert is held here
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

    The product between the kernels is of the activation dtype, as is all that enters a product.
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
        # No release has them unlike: two products, and the rest left to XLA.
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
    """Places assignments in runs of `tile_rows`, expert by expert, in the order of the batch."""
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
    """Tiles enough for any choice: every chosen expert may leave all but one row of one empty."""
    num_padding = min(num_experts, num_assignments) * (tile_rows - 1)
    return max(1, (num_assignments + num_padding) // tile_rows)
