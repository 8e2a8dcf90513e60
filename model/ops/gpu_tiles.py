"""Shared parts of the GPU kernels: tile sizes, and loads that stop at the border of an array.

Triton needs sizes that are powers of two, and would read memory after the end of an array. So each
load and store here has a `Span` for each axis. It is masked if a span may reach over the border.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# The smallest side of a matrix that tensor cores can multiply.
SMALLEST_SIDE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulTile:
    """The part of a matrix product that one program computes: rows x columns.

    It sums `depth` inputs at a time.
    """

    rows: int
    cols: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3


# None of these sizes has been timed on a GPU yet.
FIXED_TILE = MatmulTile(rows=32, cols=64, depth=64)
TILES = (
    MatmulTile(rows=16, cols=64, depth=128),
    FIXED_TILE,
    MatmulTile(rows=64, cols=128, depth=64, num_warps=8),
    MatmulTile(rows=128, cols=128, depth=64, num_warps=8),
)
# Exact float32 products run on ordinary cores. A larger tile would not fit into registers there.
FLOAT32_TILE = MatmulTile(rows=16, cols=64, depth=32, num_stages=2)


def choose_tile(num_rows: int, dtype: jnp.dtype, *, deterministic: bool) -> MatmulTile:
    """The smallest tile that holds `num_rows`; if `deterministic`, the same tile for all."""
    if dtype.itemsize > 2:
        return FLOAT32_TILE
    if deterministic:
        return FIXED_TILE
    return next((tile for tile in TILES if num_rows <= tile.rows), TILES[-1])


class Span(NamedTuple):
    """`size` places from `start` on. If `overhangs`, those at or after `limit` are masked."""

    start: Any
    size: int
    limit: Any
    overhangs: bool

    @property
    def slice(self) -> Any:
        return pl.ds(self.start, self.size)

    @property
    def inside(self) -> jax.Array:
        return self.start + lax.iota(jnp.int32, self.size) < self.limit


def load(ref: Any, *index: Any) -> jax.Array:
    """Reads a tile of one or two spans, after any scalars; zeros after the limits."""
    mask = inside(*index)
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[_places(index)], mask=mask, other=other)


def store(ref: Any, value: jax.Array, *index: Any) -> None:
    """Writes a tile; writes nothing after the limits."""
    plgpu.store(ref.at[_places(index)], value, mask=inside(*index))


def inside(*index: Any) -> jax.Array | None:
    """The mask of the spans of an index; None if no span overhangs."""
    spans = [part for part in index if isinstance(part, Span)]
    if not any(span.overhangs for span in spans):
        return None
    if len(spans) == 1:
        return spans[0].inside
    rows, cols = spans
    return rows.inside[:, None] & cols.inside[None, :]


def padded(size: int) -> int:
    """The smallest power of two that holds `size` places and that tensor cores can multiply."""
    return max(SMALLEST_SIDE, 1 << (size - 1).bit_length())


def dot(left: jax.Array, right: jax.Array, *, transpose_right: bool = False) -> jax.Array:
    """A product of two tiles, summed in float32; HIGHEST keeps float32 from becoming TF32."""
    dimensions = (((1,), (1 if transpose_right else 0,)), ((), ()))
    return lax.dot_general(
        left,
        right,
        dimensions,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _places(index: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.slice if isinstance(part, Span) else part for part in index)
