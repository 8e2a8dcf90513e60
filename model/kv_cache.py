"""The arrays of keys and values, in blocks. `block_pool` knows which sequences hold which block."""

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from milliways.model.config import ModelConfig


@struct.dataclass
class StepBatch:
    """The tokens of one step, padded to a bucket; of several sequences, in prefill or decode.

    `slots_T` is the row of `block_tables_BM` that a token's sequence has. Position p of a sequence
    is in block `block_tables_BM[slot, p // P]`, at offset `p % P`. A padding token has position -1.
    `logits_rows_W` has the indices of the tokens whose logits are wanted.
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
    """The keys and values of all layers of a shard.

    Invariant: `visible_NP` is false at a position that holds the pad token: no query sees its key.
    """

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
    """The flat index of each token in the cache. Padding is out of range, so writes drop it."""
    blocks_T = batch.block_tables_BM[batch.slots_T, batch.positions_T // block_size]
    places_T = blocks_T * block_size + batch.positions_T % block_size
    return jnp.where(batch.positions_T >= 0, places_T, num_blocks * block_size)


def scatter_rows(
    blocks_NPRK: Float[Array, "N P R K"],
    rows_TRK: Float[Array, "T R K"],
    places_T: Int[Array, " T"],
) -> Float[Array, "N P R K"]:
    """The blocks, with each row written to its place; drops rows whose place is out of range."""
    flat = blocks_NPRK.reshape(-1, *blocks_NPRK.shape[2:])
    return flat.at[places_T].set(rows_TRK, mode="drop").reshape(blocks_NPRK.shape)


def read_block(
    layers_L: tuple[LayerCache, ...], block_id: Int[Array, ""]
) -> tuple[Float[Array, "L P R K"], Float[Array, "L P R K"]]:
    """The keys and values of one block, of all layers."""

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
    """The layers and the visibility, with one block replaced."""
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
    """Records which positions of the step later queries may see: all but those of pad tokens."""
    places_T = token_places(batch, *visible_NP.shape)
    seen_T = batch.token_ids_T != pad_token
    return visible_NP.reshape(-1).at[places_T].set(seen_T, mode="drop").reshape(visible_NP.shape)
