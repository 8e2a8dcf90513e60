"""Arithmetic whose bits do not depend on the batch around it.

XLA on CPU picks the order of a reduction from its shape, and contracts a product and a sum into one
rounding where it happens to fuse them. So a row summed in a batch of 3 differs in the last bit from
the same row in a batch of 4, and a layer compiled alone from the same layer in a larger program.

`map_tiles` closes both doors: arithmetic runs on tiles of exactly `TILE` rows, in a loop whose trip
count the compiler cannot see. It can neither unroll that loop nor fuse across its border, so a tile
is the same code wherever it stands.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TILE = 8


def map_tiles(tile: Callable[..., Any], *rows: Any) -> Any:
    """Applies `tile` to runs of TILE rows of every leaf of `rows`, the last padded with zeros.

    `tile` maps arrays [TILE, ...] to arrays [TILE, ...]; row i of the result may depend on row i
    of the arguments alone.
    """
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    num_tiles = -(-num_rows // TILE)

    def cut(leaf: jax.Array) -> jax.Array:
        padding = [(0, num_tiles * TILE - num_rows)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, padding).reshape(num_tiles, TILE, *leaf.shape[1:])

    def join(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(num_tiles * TILE, *leaf.shape[2:])[:num_rows]

    tiles = jax.tree.map(cut, rows)

    def run(i: jax.Array, out: Any) -> Any:
        results = tile(*jax.tree.map(lambda leaf: leaf[i], tiles))
        return jax.tree.map(lambda whole, part: whole.at[i].set(part), out, results)

    shapes = jax.eval_shape(tile, *jax.tree.map(lambda leaf: leaf[0], tiles))
    out = jax.tree.map(lambda s: jnp.zeros((num_tiles, *s.shape), s.dtype), shapes)
    return jax.tree.map(join, lax.fori_loop(0, _opaque(num_tiles), run, out))


def _opaque(count: int) -> jax.Array:
    """A number the compiler must treat as unknown."""
    return lax.optimization_barrier(jnp.int32(count))
