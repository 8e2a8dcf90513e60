"""The arrays that hold keys and values, in blocks. Which block belongs to whom: `block_pool`."""

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from milliways.model.config import ModelConfig


@struct.dataclass
class StepBatch:
    """The tokens of one step: of any sequences, prefill and decode mixed, padded to a bucket.

    `slots_T` names the row of `block_tables_BM` a token's sequence occupies; its position p lies in
    block `block_tables_BM[slot, p // P]` at offset `p % P`. Padding tokens stand at position -1.
    `logits_rows_W` picks the tokens whose logits are wanted.
    """

    token_ids_T: Int[Array, " T"]
    positions_T: Int[Array, " T"]
    slots_T: Int[Array, " T"]
    block_tables_BM: Int[Array, "B M"]
    logits_rows_W: Int[Array, " W"]


@struct.dataclass
class LayerCache:
    """Keys (after RoPE) and values of one layer."""

    keys_NPRK: Float[Array, "N P R K"]
    values_NPRK: Float[Array, "N P R K"]


@struct.dataclass
class KVCache:
    """All layers of a shard. A position holding the pad token is never visible as a key."""

    layers_L: tuple[LayerCache, ...]
    visible_NP: Bool[Array, "N P"]


def make_kv_cache(
    config: ModelConfig, num_layers: int, num_blocks: int, block_size: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache of `num_blocks` blocks of `block_size` positions for each layer."""
    shape = (num_blocks, block_size, config.num_kv_heads, config.key_size)
    layers = tuple(
        LayerCache(keys_NPRK=jnp.zeros(shape, dtype), values_NPRK=jnp.zeros(shape, dtype))
        for _ in range(num_layers)
    )
    return KVCache(layers_L=layers, visible_NP=jnp.zeros((num_blocks, block_size), jnp.bool))


def token_places(batch: StepBatch, num_blocks: int, block_size: int) -> Int[Array, " T"]:
    """Flat place of each token in the cache; out of range for padding, so that writes drop it."""
    blocks_T = batch.block_tables_BM[batch.slots_T, batch.positions_T // block_size]
    places_T = blocks_T * block_size + batch.positions_T % block_size
    return jnp.where(batch.positions_T >= 0, places_T, num_blocks * block_size)


def scatter_rows(
    blocks_NPRK: Float[Array, "N P R K"],
    rows_TRK: Float[Array, "T R K"],
    places_T: Int[Array, " T"],
) -> Float[Array, "N P R K"]:
    """The blocks with each row written to its place; a place out of range drops it."""
    flat = blocks_NPRK.reshape(-1, *blocks_NPRK.shape[2:])
    return flat.at[places_T].set(rows_TRK, mode="drop").reshape(blocks_NPRK.shape)


def read_block(
    layers_L: tuple[LayerCache, ...], block_id: Int[Array, ""]
) -> tuple[Float[Array, "L P R K"], Float[Array, "L P R K"]]:
    """Keys and values of one block in all layers."""

    def of(arrays_NPRK: list[Array]) -> Array:
        return jnp.stack([lax.dynamic_index_in_dim(a, block_id, 0, False) for a in arrays_NPRK])

    return of([layer.keys_NPRK for layer in layers_L]), of([la.values_NPRK for la in layers_L])


def write_block(
    layers_L: tuple[LayerCache, ...],
    visible_NP: Bool[Array, "N P"],
    block_id: Int[Array, ""],
    is_visible_P: Bool[Array, " P"],
    keys_LPRK: Float[Array, "L P R K"],
    values_LPRK: Float[Array, "L P R K"],
) -> tuple[tuple[LayerCache, ...], Bool[Array, "N P"]]:
    """The layers, and what is visible, with one block put in."""
    put = lax.dynamic_update_index_in_dim
    layers_L = tuple(
        LayerCache(
            keys_NPRK=put(layer.keys_NPRK, keys_LPRK[i], block_id, 0),
            values_NPRK=put(layer.values_NPRK, values_LPRK[i], block_id, 0),
        )
        for i, layer in enumerate(layers_L)
    )
    return layers_L, put(visible_NP, is_visible_P, block_id, 0)


def mark_visible(
    visible_NP: Bool[Array, "N P"], batch: StepBatch, pad_token: int
) -> Bool[Array, "N P"]:
    """Records which of the step's positions later queries may see: all but pad tokens."""
    places_T = token_places(batch, *visible_NP.shape)
    seen_T = batch.token_ids_T != pad_token
    return visible_NP.reshape(-1).at[places_T].set(seen_T, mode="drop").reshape(visible_NP.shape)
