"""Rows times quantised matrices on a GPU, the weights read as they are stored.

A program loads an integer tile, converts it in registers, multiplies it on tensor cores, and gives
each scale row's sum its scales: a dequantised weight exists nowhere but there. Nothing else is sure
of that: XLA may fuse the conversion into its own product, but it times the candidates and may as
well pick a library's, before which it writes the converted matrix out.

Bits: a row is summed over its inputs in steps of `tile.depth`, in order, by one program, and what
else the tile holds does not enter the sum. So its bits depend on the tile chosen, not on the number
of rows, as long as one tile is used throughout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from milliways.model.ops.gpu_tiles import MatmulTile, Span, dot, load, store
from milliways.model.params import Matrix, QuantizedMatrix

# Takes the scaled float32 sums of each matrix, gives what is written.
Epilogue = Callable[..., jax.Array]


def only(sums: jax.Array) -> jax.Array:
    """The epilogue of a plain product."""
    return sums


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The epilogue of an expert's first half."""
    return jax.nn.gelu(gate, approximate=True) * up


def plain(matrix: Matrix) -> QuantizedMatrix:
    """The matrix, which must not be packed."""
    assert isinstance(matrix, QuantizedMatrix), "packed for the CPU kernels, not for a GPU"
    return matrix


def matmul(
    rows_TK: Float[Array, "T K"], matrix: QuantizedMatrix, *, tile: MatmulTile, interpret: bool
) -> Float[Array, "T N"]:
    """rows @ dequantised matrix, float32."""
    stack = jax.tree.map(lambda leaf: leaf[None], matrix)
    all_the_first = jnp.zeros(pl.cdiv(rows_TK.shape[0], tile.rows), jnp.int32)
    return grouped_matmul(rows_TK, all_the_first, (stack,), tile=tile, interpret=interpret)


def grouped_matmul(
    rows_CK: Float[Array, "C K"],
    tile_experts_I: Int[Array, " I"],
    stacks: tuple[QuantizedMatrix, ...],
    *,
    tile: MatmulTile,
    interpret: bool,
    epilogue: Epilogue = only,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "C N"]:
    """Each run of `tile.rows` rows times the matrices of its own expert, joined by `epilogue`.

    Rows whose tile names expert -1 are neither computed nor written: their results are arbitrary.
    """
    num_groups = {stack.num_scale_rows for stack in stacks}
    assert len(num_groups) == 1, "matrices that are summed together have their scale rows alike"
    # The lowering computes places in 32 bits, whatever their number, below 4 GiB.
    assert all(stack.weight.size < 2**31 for stack in stacks)
    (num_rows, num_in), num_out = rows_CK.shape, stacks[0].weight.shape[-1]
    shape = _Shape(num_rows, num_in, num_out, num_groups.pop(), tile)
    return pl.pallas_call(
        partial(_matmul_kernel, shape=shape, epilogue=epilogue),
        grid=(pl.cdiv(num_rows, tile.rows), pl.cdiv(num_out, tile.cols)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), out_dtype or jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="quantized_matmul",
    )(tile_experts_I, rows_CK, *(leaf for stack in stacks for leaf in (stack.weight, stack.scales)))


class _Shape(NamedTuple):
    """What a kernel knows before it is compiled."""

    num_rows: int
    num_in: int
    num_out: int
    num_groups: int
    tile: MatmulTile


def _matmul_kernel(
    tile_experts_ref: Any, rows_ref: Any, *refs: Any, shape: _Shape, epilogue: Epilogue
) -> None:
    # Programs of one column tile run side by side, so that they share its weights in the cache.
    row_tile, col_tile = pl.program_id(0), pl.program_id(1)
    tile, out_ref = shape.tile, refs[-1]
    expert = tile_experts_ref[row_tile]
    rows = _span(row_tile, tile.rows, shape.num_rows)
    cols = _span(col_tile, tile.cols, shape.num_out)

    @pl.when(expert >= 0)
    def _compute() -> None:
        sums = _scaled_sums(rows_ref, refs[:-1:2], refs[1:-1:2], (expert, rows, cols), shape)
        store(out_ref, epilogue(*sums).astype(out_ref.dtype), rows, cols)


def _scaled_sums(
    rows_ref: Any,
    weight_refs: tuple[Any, ...],
    scale_refs: tuple[Any, ...],
    where: tuple[Any, Span, Span],
    shape: _Shape,
) -> tuple[jax.Array, ...]:
    """A float32 sum for each matrix: each scale row's inputs summed, scaled, then added."""
    expert, rows, cols = where
    tile, group_size = shape.tile, shape.num_in // shape.num_groups
    zeros = tuple(jnp.zeros((rows.size, cols.size), jnp.float32) for _ in weight_refs)

    def add_group(group: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        end = (group + 1) * group_size

        def add_step(step: Any, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            start = group * group_size + step * tile.depth
            inputs = Span(start, tile.depth, end, group_size % tile.depth != 0)
            row_tile = load(rows_ref, rows, inputs)
            return tuple(
                part + _product(row_tile, load(weight_ref, expert, inputs, cols))
                for part, weight_ref in zip(parts, weight_refs, strict=True)
            )

        parts = lax.fori_loop(0, pl.cdiv(group_size, tile.depth), add_step, zeros)
        return tuple(
            total + part * load(scale_ref, expert, group, cols).astype(jnp.float32)[None, :]
            for total, part, scale_ref in zip(totals, parts, scale_refs, strict=True)
        )

    return lax.fori_loop(0, shape.num_groups, add_group, zeros)


def _product(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Exact products of activations and integer weights, summed in float32.

    bfloat16 holds every int8, but not every int16: that is split in two halves that it does hold.
    """
    if weight.dtype == jnp.int8 or rows.dtype == jnp.float32:
        return dot(rows, weight.astype(rows.dtype))
    wide = weight.astype(jnp.int32)
    high = (wide + 128) >> 8
    low = wide - (high << 8)
    return dot(rows, high.astype(rows.dtype)) * 256.0 + dot(rows, low.astype(rows.dtype))


def _span(index: Any, size: int, limit: int) -> Span:
    return Span(index * size, size, limit, limit % size != 0)
