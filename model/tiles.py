"""Arithmetic that gives a row the same bits in any batch and in any compiled program.

XLA on CPU chooses the order of a reduction by its shape. If it fuses a product and a sum, it rounds
once instead of twice. So a row that is summed in a batch of 3 can differ in its last bit from the
same row in a batch of 4. A layer that is compiled alone can differ from the same layer in a larger
program.

`map_tiles` prevents both. It computes tiles of exactly `TILE` rows, in a loop whose trip count the
compiler does not know. The compiler cannot unroll this loop or fuse code across its border, so each
tile runs the same code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TILE = 8


def map_tiles(tile: Callable[..., Any], *rows: Any) -> Any:
    """Applies `tile` to every TILE rows of the leaves of `rows`; pads the last ones with zeros.

    `tile` maps arrays [TILE, ...] to arrays [TILE, ...]. Row i of its result must depend on row i
    of its arguments only.
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
    """The number, in a form that the compiler must treat as unknown."""
    return lax.optimization_barrier(jnp.int32(count))
